#include "encode.h"

#include "encode_body.inc"

namespace narrowcast {

const EncodeKernels encode_avx512vnni = {choose, encode, error, pack_fields, unpack_fields};

}  // namespace narrowcast
