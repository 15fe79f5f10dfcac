// How this build was made, for `fishleg-ext info`.
//
// Free of torch and of the CUDA runtime, so that it loads on every machine it was built for.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build, module) {
  module.doc() = "How the CUDA part of fishleg_ext was built.";
  module.attr("cuda_toolkit") = FISHLEG_EXT_CUDA_TOOLKIT;
  module.attr("architectures") = FISHLEG_EXT_ARCHITECTURES;
  module.attr("compiler") = FISHLEG_EXT_COMPILER;
}
