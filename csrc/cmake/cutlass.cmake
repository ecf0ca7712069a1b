# Finds the headers of CUTLASS, NVIDIA's templates for GEMM kernels, and compiles the kernels made of them.
#
# Looked for in LAMINA_CUTLASS_DIR (its root or include folder, or a wheel of nvidia-cutlass; a variable of CMake or of the
# environment), then in the package nvidia-cutlass of the Python environment, and else fetched with pip into the build
# folder. Only a build needs them.
set(LAMINA_CUTLASS "AUTO" CACHE STRING "Build the kernels made of CUTLASS: AUTO (when its headers can be had), ON or OFF")
set(LAMINA_CUTLASS_DIR "$ENV{LAMINA_CUTLASS_DIR}" CACHE PATH "CUTLASS: its root or include folder, or a wheel of nvidia-cutlass")
set(lamina_cutlass_package "nvidia-cutlass==4.2.0.0")

# Sets `result` to the folder with cutlass/cutlass.h under `root`, or to an empty string.
function(lamina_cutlass_include_under root result)
  foreach(folder "" /include /source/include /cutlass_library/source/include)
    if(root AND EXISTS "${root}${folder}/cutlass/cutlass.h")
      set(${result} "${root}${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${result} "" PARENT_SCOPE)
endfunction()

function(lamina_find_cutlass result)
  set(${result} "" PARENT_SCOPE)
  string(TOUPPER "${LAMINA_CUTLASS}" wanted)
  if(wanted MATCHES "^(OFF|0|FALSE|NO)$")
    return()
  endif()
  if(LAMINA_CUTLASS_DIR)
    set(root "${LAMINA_CUTLASS_DIR}")
    if(root MATCHES "\\.whl$" AND EXISTS "${root}")
      file(ARCHIVE_EXTRACT INPUT "${root}" DESTINATION "${CMAKE_BINARY_DIR}/cutlass")
      set(root "${CMAKE_BINARY_DIR}/cutlass")
    endif()
    lamina_cutlass_include_under("${root}" include)
    if(NOT include)
      message(FATAL_ERROR "LAMINA_CUTLASS_DIR=${LAMINA_CUTLASS_DIR} has no cutlass/cutlass.h; name the root or include folder of CUTLASS, or a wheel of ${lamina_cutlass_package}")
    endif()
    set(${result} "${include}" PARENT_SCOPE)
    return()
  endif()
  # -I: an isolated build hides the environment, in which both the package and pip are, behind one of its own.
  set(where "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')")
  execute_process(COMMAND ${Python_EXECUTABLE} -I -c "${where}" OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  lamina_cutlass_include_under("${root}" include)
  set(fetched "${CMAKE_BINARY_DIR}/cutlass")
  if(NOT include)
    lamina_cutlass_include_under("${fetched}" include)
  endif()
  if(NOT include)
    message(STATUS "lamina: fetching ${lamina_cutlass_package}")
    execute_process(
      COMMAND ${Python_EXECUTABLE} -I -m pip install -q --disable-pip-version-check --retries 0 --timeout 10 --no-deps --target ${fetched} ${lamina_cutlass_package}
      RESULT_VARIABLE failed OUTPUT_QUIET ERROR_VARIABLE reason)
    if(failed)
      message(STATUS "lamina: ${reason}")
    endif()
    lamina_cutlass_include_under("${fetched}" include)
  endif()
  if(NOT include AND NOT wanted STREQUAL "AUTO")
    message(FATAL_ERROR "LAMINA_CUTLASS=${LAMINA_CUTLASS}, but CUTLASS was not found; set LAMINA_CUTLASS_DIR, or install ${lamina_cutlass_package} with pip, or let pip reach a package index")
  endif()
  set(${result} "${include}" PARENT_SCOPE)
endfunction()

# csrc/cuda/<kernel>_sm90.cu is compiled for 90a only, whose instructions no other device has; csrc/cuda/<kernel>_sm80.cu
# for the other architectures. Appends the names of the object libraries to `libraries`.
function(lamina_add_cutlass_kernels include libraries)
  set(made ${${libraries}})
  set(sm90 ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER sm90 INCLUDE REGEX "^90a")
  set(sm80 ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER sm80 EXCLUDE REGEX "^90a")
  foreach(generation sm80 sm90)
    if(NOT ${generation})
      continue()
    endif()
    file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/*_${generation}.cu)
    set(objects lamina_cutlass_${generation})
    add_library(${objects} OBJECT ${kernels})
    # Hidden: PyTorch has templates of CUTLASS in it, too.
    set_target_properties(${objects} PROPERTIES
      CUDA_STANDARD 20 CUDA_ARCHITECTURES "${${generation}}" CUDA_VISIBILITY_PRESET hidden)
    target_include_directories(${objects} PRIVATE csrc)
    target_include_directories(${objects} SYSTEM PRIVATE ${include})
    # An assert in a kernel is a function call, across which wgmma cannot stay in flight: whatever the build type.
    target_compile_definitions(${objects} PRIVATE NDEBUG)
    target_compile_options(${objects} PRIVATE --expt-relaxed-constexpr)
    list(APPEND made ${objects})
    string(TOUPPER ${generation} name)
    set_property(SOURCE csrc/bindings/cuda.cpp csrc/ops/cuda/int8_linear.cpp
      APPEND PROPERTY COMPILE_DEFINITIONS LAMINA_WITH_CUTLASS LAMINA_WITH_CUTLASS_${name})
  endforeach()
  set(${libraries} ${made} PARENT_SCOPE)
endfunction()
