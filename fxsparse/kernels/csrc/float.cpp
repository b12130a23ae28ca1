#include "instances.h"

namespace fxsparse {
FXSPARSE_INSTANCES(, float)
}  // namespace fxsparse
