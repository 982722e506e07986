# Which instruction-set tiers this processor family has, and the compiler flags of each. The suffix of a source file's
# name chooses its tier: linear_int8_avx2.cpp. One translation unit per tier: never raise the flags of a whole library.
set(X86_TIERS avx2 avxvnni avxvnni_evex avx512vnni avx512bf16)
set(ARM_TIERS neondot neoni8mm)
set(NARROWCAST_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(NARROWCAST_FLAGS_avxvnni ${NARROWCAST_FLAGS_avx2} -mavxvnni)
# The same bodies in the encoding of AVX-512, for CPUs that have vpdpbusd only there.
set(NARROWCAST_FLAGS_avxvnni_evex ${NARROWCAST_FLAGS_avx2} -mavx512f -mavx512vl -mavx512vnni -mprefer-vector-width=256)
set(NARROWCAST_FLAGS_avx512vnni ${NARROWCAST_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
    -mprefer-vector-width=512)
# No tier of its own: kernels for float inputs use it beside AVX-512 VNNI where the CPU has it.
set(NARROWCAST_FLAGS_avx512bf16 ${NARROWCAST_FLAGS_avx512vnni} -mavx512bf16)
set(NARROWCAST_FLAGS_neondot -march=armv8.2-a+dotprod)
set(NARROWCAST_FLAGS_neoni8mm -march=armv8.2-a+dotprod+i8mm)

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" PROCESSOR)
set(NARROWCAST_X86 0)
set(NARROWCAST_ARM 0)
set(TIERS "")
if(PROCESSOR MATCHES "^(x86_64|amd64)$" AND NOT MSVC)
  set(NARROWCAST_X86 1)
  set(TIERS ${X86_TIERS})
elseif(PROCESSOR MATCHES "^(aarch64|arm64)$" AND NOT MSVC)
  set(NARROWCAST_ARM 1)
  set(TIERS ${ARM_TIERS})
endif()

# Drops the sources of other processor families from the list named `variable`, and gives the others their flags.
macro(narrowcast_choose_tiers variable)
  foreach(TIER IN LISTS X86_TIERS ARM_TIERS)
    foreach(SOURCE IN LISTS ${variable})
      if(SOURCE MATCHES "_${TIER}\\.cpp$")
        if(TIER IN_LIST TIERS)
          set_source_files_properties("${SOURCE}" PROPERTIES COMPILE_OPTIONS "${NARROWCAST_FLAGS_${TIER}}")
        else()
          list(REMOVE_ITEM ${variable} "${SOURCE}")
        endif()
      endif()
    endforeach()
  endforeach()
endmacro()

# What every file needs, of the library and of its native tests.
macro(narrowcast_compile_options target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_definitions(${target} PRIVATE NARROWCAST_X86=${NARROWCAST_X86} NARROWCAST_ARM=${NARROWCAST_ARM})
  if(NOT MSVC)
    # No contraction of a*b+c: every tier and the torch reference must round alike.
    target_compile_options(${target} PRIVATE -Wall -Wextra -O3 -ffp-contract=off -fno-math-errno)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC's own intrinsics headers trip over its warning about undefined registers (GCC bug 105593).
      target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized -Wno-uninitialized)
    endif()
  endif()
endmacro()
