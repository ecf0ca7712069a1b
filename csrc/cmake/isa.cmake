# Compiles csrc/cpu/kernels once per instruction set.
#
#   <kernel>.cpp        portable: one object for every row of isa.def that compiles them, each with that row's flags
#   <kernel>.<isa>.cpp  hand-written: one object, with the flags of the ISA in its name only
#
# Flags are set per generated file, never on a target: code outside kernels/ stays at the baseline and
# runs on any x86-64. Objects go straight into the module, since a static archive would drop the ones that
# only register themselves.
function(lamina_add_isa_kernels target isa_def kernel_dir)
  set(root ${CMAKE_CURRENT_SOURCE_DIR})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${root}/${isa_def})
  file(STRINGS ${root}/${isa_def} rows REGEX "^ISA_ROW\\(")
  set(isas)
  set(portable_isas)
  foreach(row IN LISTS rows)
    string(REGEX MATCH "^ISA_ROW\\(([a-z0-9_]+), *\"([^\"]*)\", *(compiled|as below)," matched "${row}")
    list(APPEND isas ${CMAKE_MATCH_1})
    if(CMAKE_MATCH_3 STREQUAL "compiled")
      list(APPEND portable_isas ${CMAKE_MATCH_1})
    endif()
    separate_arguments(flags_${CMAKE_MATCH_1} UNIX_COMMAND "${CMAKE_MATCH_2}")
  endforeach()

  file(GLOB kernels CONFIGURE_DEPENDS RELATIVE ${root}/${kernel_dir} ${root}/${kernel_dir}/*.cpp)
  foreach(kernel IN LISTS kernels)
    string(REGEX REPLACE "\\.cpp$" "" stem ${kernel})
    if(stem MATCHES "^(.+)\\.([a-z0-9_]+)$")
      set(targets ${CMAKE_MATCH_2})
      set(hand_written 1)
      if(NOT targets IN_LIST isas)
        message(FATAL_ERROR "${kernel_dir}/${kernel}: '${targets}' is not a row of ${isa_def} (${isas})")
      endif()
    else()
      set(targets ${portable_isas})
      set(hand_written 0)
    endif()
    foreach(isa IN LISTS targets)
      set(copy ${CMAKE_CURRENT_BINARY_DIR}/kernels/${stem}.${hand_written}.${isa}.cpp)
      file(GENERATE OUTPUT ${copy} CONTENT "#include \"cpu/kernels/${kernel}\"\n")
      set_source_files_properties(${copy} PROPERTIES
        COMPILE_OPTIONS "${flags_${isa}}"
        COMPILE_DEFINITIONS "LAMINA_ISA=${isa};LAMINA_HAND_WRITTEN=${hand_written}"
        OBJECT_DEPENDS ${root}/${kernel_dir}/${kernel})
      target_sources(${target} PRIVATE ${copy})
    endforeach()
  endforeach()
endfunction()
