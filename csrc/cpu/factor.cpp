// U, V or S by itself, fp32 (rows, rank). The other ops regenerate it inside.
#include "noise_vec.h"
#include "ops.h"

namespace lozo {
namespace LOZO_ISA {
namespace {
constexpr int64_t kRows = 256;
}

void factor(const lozo_factor *f, float *out) {
  const int rank = (int)f->rank;
  int32_t pairs[(LOZO_MAX_RANK / 2) * kRows];
  for (int64_t i = 0; i < f->rows; i += kRows) {
    const int64_t some = f->rows - i < kRows ? f->rows - i : kRows;
    factor_pairs(pairs, kRows, f->seed, (Stream)f->stream, f->draw, f->direction, f->tensor_id, (uint64_t)(f->row_offset + i), some,
                 rank);
    for (int64_t row = 0; row < some; ++row)
      for (int k = 0; k < rank; ++k) {
        const int32_t pair = pairs[k / 2 * kRows + row];
        *out++ = (float)(k % 2 ? pair >> 16 : (int16_t)pair) * kGridStep;
      }
  }
}

}  // namespace LOZO_ISA
}  // namespace lozo
