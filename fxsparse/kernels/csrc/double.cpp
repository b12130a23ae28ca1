#include "instances.h"

namespace fxsparse {
FXSPARSE_INSTANCES(, double)
}  // namespace fxsparse
