# Compiles csrc/cuda/*.cu (kernels) when LAMINA_CUDA is ON, or AUTO and nvcc is found; lamina_link_cuda puts them into a
# module, with csrc/ops/cuda/*.cpp (checks, and which kernel runs).
# Included, not called: enable_language only works at the scope of the project. Before the module is declared, and in
# object libraries: ninja begins with what is declared first, and a .cu takes as long as a dozen others.
string(TOUPPER "${LAMINA_CUDA}" lamina_cuda)
set(lamina_with_cuda FALSE)
if(NOT lamina_cuda MATCHES "^(OFF|0|FALSE|NO)$")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(lamina_with_cuda TRUE)
  elseif(NOT lamina_cuda STREQUAL "AUTO")
    message(FATAL_ERROR "LAMINA_CUDA=${LAMINA_CUDA}, but nvcc was not found; install the CUDA toolkit or set it OFF")
  endif()
endif()
message(STATUS "lamina: CUDA kernels ${lamina_with_cuda} (LAMINA_CUDA=${LAMINA_CUDA})")

set(lamina_cuda_libraries)
if(lamina_with_cuda)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100-real)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)

  include(csrc/cmake/cutlass.cmake)
  lamina_find_cutlass(lamina_cutlass)
  if(lamina_cutlass)
    message(STATUS "lamina: CUTLASS kernels TRUE (${lamina_cutlass})")
    lamina_add_cutlass_kernels(${lamina_cutlass} lamina_cuda_libraries)
  else()
    message(STATUS "lamina: CUTLASS kernels FALSE (LAMINA_CUTLASS=${LAMINA_CUTLASS}): Triton multiplies int8 in their place")
  endif()

  file(GLOB lamina_cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
  list(FILTER lamina_cuda_kernels EXCLUDE REGEX "_sm[0-9]+\\.cu$")
  add_library(lamina_cuda OBJECT ${lamina_cuda_kernels})
  set_target_properties(lamina_cuda PROPERTIES CUDA_STANDARD 20 CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  target_include_directories(lamina_cuda PRIVATE csrc)
  list(APPEND lamina_cuda_libraries lamina_cuda)
endif()

# Nothing to do in a build without CUDA.
function(lamina_link_cuda target)
  if(NOT lamina_with_cuda)
    return()
  endif()
  file(GLOB sources CONFIGURE_DEPENDS csrc/ops/cuda/*.cpp)
  target_sources(${target} PRIVATE ${sources})
  foreach(library IN LISTS lamina_cuda_libraries)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${library}>)
  endforeach()
  # For the one file that asks, or a build with CUDA would share no object of the CPU's with one without.
  set_property(SOURCE csrc/bindings/cuda.cpp APPEND PROPERTY COMPILE_DEFINITIONS LAMINA_WITH_CUDA)
  # Statically: the module then loads on machines without a driver.
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()
