// The functions of convolution.h and weight_gradient.h for the types and block sizes that there are. Each type is compiled in a file of its
// own, at the same time as the others.
#pragma once

#include "weight_gradient.h"

#define FXSPARSE_INSTANCES(EXTERN, T) \
  FXSPARSE_INSTANCE(EXTERN, T, 1)     \
  FXSPARSE_INSTANCE(EXTERN, T, 2)     \
  FXSPARSE_INSTANCE(EXTERN, T, 4)     \
  FXSPARSE_INSTANCE(EXTERN, T, 8)

#define FXSPARSE_INSTANCE(EXTERN, T, R)                                                                               \
  EXTERN template void forward<T, R>(                                                                                 \
      const Geometry&, const T*, const Strides&, const Rows&, int64_t, const T*, const Finish<T>&, T*,                \
      const Strides&, const at::Tensor*);                                                                                                \
  EXTERN template void forward_vector<T, R>(const T*, const Rows&, int64_t, const T*, const Finish<T>&, T*);          \
  EXTERN template void input_gradient<T, R>(                                                                          \
      const Geometry&, const T*, const Strides&, const Columns&, int64_t, const T*, T*, const Strides&);              \
  EXTERN template void weight_gradient<T, R>(                                                                         \
      const Geometry&, const T*, const Strides&, const T*, const Strides&, const Rows&, int64_t, T*);

namespace fxsparse {
FXSPARSE_INSTANCES(extern, float)
FXSPARSE_INSTANCES(extern, double)
}  // namespace fxsparse
