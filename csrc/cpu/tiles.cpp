#include "tiles.h"

#include <algorithm>
#include <new>
#include <vector>

#include "threads.h"

namespace lozo {
namespace {

constexpr int64_t kMinTile = 1 << 14, kMaxTile = 1 << 20;  // elements
constexpr int64_t kTilesPerThread = 8;                     // so that the last tiles of all threads end together
constexpr int64_t kElementsPerThread = 1 << 16;            // elements; with fewer, waking a thread costs more than it saves
constexpr int64_t kMinColumns = 1024, kColumnUnit = 64;    // columns of a tile that does not span all of them

struct Grid {
  int64_t first;  // index of the first tile
  int64_t tile_rows, tile_cols;
  int64_t down, across;  // tiles in a matrix
};

struct Plan {
  const lozo_tensor *outputs;
  std::vector<lozo_tensor> tensors;
  std::vector<Grid> grids;
  int64_t tiles = 0;
  int64_t elements = 0;
};

struct Run {
  const Plan *plan;
  const Work *work;
};

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

bool is_flat(const lozo_tensor &t, const lozo_tensor &strides) {
  const bool rows_touch = t.rows <= 1 || strides.row_stride == t.cols;
  const bool matrices_touch = t.batch <= 1 || strides.batch_stride == t.rows * t.cols;
  return rows_touch && matrices_touch;
}

lozo_tensor flat(lozo_tensor t, const lozo_tensor &out) {
  if (!is_flat(t, t) || !is_flat(t, out) || t.col_offset != 0 || t.global_cols != t.cols) return t;
  t.col_offset = t.row_offset * t.cols;
  t.cols *= t.batch * t.rows;
  t.batch = t.rows = 1;
  t.row_offset = 0;
  t.global_cols = t.cols;
  return t;
}

Grid make_grid(const lozo_tensor &t, const Grain &grain, int64_t target) {
  Grid g{0, t.rows, t.cols, 0, 0};
  if (t.batch <= 0 || t.rows <= 0 || t.cols <= 0) return g;
  g.tile_rows = std::min(t.rows, std::clamp(target / t.cols / 16 * 16, grain.min_rows, grain.max_rows));
  if (grain.split_columns && g.tile_rows * t.cols > 2 * target)
    g.tile_cols = std::min(t.cols, std::max(kMinColumns, divide_up(target / g.tile_rows, kColumnUnit) * kColumnUnit));
  g.down = divide_up(t.rows, g.tile_rows);
  g.across = divide_up(t.cols, g.tile_cols);
  return g;
}

Plan make_plan(const Work &work) {
  Plan plan;
  plan.outputs = work.out ? work.out : work.tensors;
  plan.tensors.reserve(work.count);
  plan.grids.reserve(work.count);
  for (int64_t i = 0; i < work.count; ++i) {
    plan.tensors.push_back(work.flatten ? flat(work.tensors[i], plan.outputs[i]) : work.tensors[i]);
    const lozo_tensor &t = plan.tensors.back();
    plan.elements += t.batch * t.rows * t.cols;
  }
  const int64_t share = plan.elements / (std::max<int64_t>(1, work.threads) * kTilesPerThread);
  const int64_t target = std::clamp(share, kMinTile, kMaxTile);
  for (const lozo_tensor &t : plan.tensors) {
    Grid g = make_grid(t, work.grain, target);
    g.first = plan.tiles;
    plan.tiles += g.down * g.across * t.batch;
    plan.grids.push_back(g);
  }
  return plan;
}

Tile find_tile(const Plan &plan, int64_t number) {
  const auto after =
      std::upper_bound(plan.grids.begin(), plan.grids.end(), number, [](int64_t n, const Grid &g) { return n < g.first; });
  const int64_t index = after - plan.grids.begin() - 1;
  const Grid &g = plan.grids[index];
  const lozo_tensor &t = plan.tensors[index];
  int64_t rest = number - g.first;
  Tile tile{&t, &plan.outputs[index], index, 0, 0, 0, 0, 0};
  tile.col = rest % g.across * g.tile_cols;
  rest /= g.across;
  tile.row = rest % g.down * g.tile_rows;
  tile.matrix = rest / g.down;
  tile.rows = std::min(g.tile_rows, t.rows - tile.row);
  tile.cols = std::min(g.tile_cols, t.cols - tile.col);
  return tile;
}

void run_tile(int64_t number, char *scratch, const void *context) {
  const Run &run = *static_cast<const Run *>(context);
  run.work->tile(find_tile(*run.plan, number), scratch, run.work->context);
}

}  // namespace

int for_each_tile(const Work &work) {
  try {
    const Plan plan = make_plan(work);
    if (plan.tiles == 0) return LOZO_OK;
    const Run run{&plan, &work};
    const int64_t threads = std::min(work.threads, 1 + plan.elements * work.weight / kElementsPerThread);
    return share_out(plan.tiles, threads, work.scratch_bytes, run_tile, &run) ? LOZO_OK : LOZO_NO_MEMORY;
  } catch (const std::bad_alloc &) {
    return LOZO_NO_MEMORY;
  }
}

bool valid_call(const lozo_tensor *tensors, int64_t count, const lozo_call *call, bool low_rank) {
  if (count < 0 || call->num_draws < 0 || (!call->draws && call->num_draws > LOZO_MAX_DRAWS)) return false;
  if (call->law != LOZO_NORMAL && call->law != LOZO_RADEMACHER) return false;
  if (low_rank && count > 0 && (call->rank < 1 || call->rank > LOZO_MAX_RANK)) return false;
  for (int64_t i = 0; i < count; ++i)
    if (!is_dtype(tensors[i].dtype)) return false;
  return true;
}

bool has_parts(const lozo_call *call) { return call->num_draws == 1 && call->parts >= 1 && call->parts <= LOZO_MAX_PARTS; }

bool are_factors(const lozo_tensor *tensors, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (tensors[i].dtype != LOZO_FLOAT32 || tensors[i].cols < 1 || tensors[i].cols > LOZO_MAX_RANK) return false;
  return true;
}

bool valid_skinny(const lozo_skinny *s) {
  if (!is_dtype(s->y_dtype) || s->rank < 1 || s->rank > LOZO_MAX_RANK) return false;
  if (s->rows < 0 || s->cols < 0 || s->groups < 1 || s->tokens < 0 || s->tokens % s->groups != 0) return false;
  if (s->tensor_id < 0 || s->tensor_id >> 32 || s->row_offset < 0 || s->row_offset + s->rows > int64_t{1} << 32) return false;
  for (int64_t g = 0; g < s->groups; ++g)
    if (s->draws[2 * g] < 0 || s->draws[2 * g] >> 28 || s->draws[2 * g + 1] < 0 || s->draws[2 * g + 1] >> 24) return false;
  return true;
}

bool valid_points(const lozo_points *s) {
  if (!is_dtype(s->y_dtype) || !is_dtype(s->x_dtype) || s->ranks < 1) return false;
  if (s->tokens < 0 || s->rows < 0 || s->cols < 0) return false;
  if (!s->u) return true;
  if (s->rank < 1 || s->rank > LOZO_MAX_RANK || s->rank > s->ranks) return false;
  for (int64_t t = 0; t < s->tokens; ++t)
    if (s->directions[t] < 0 || s->directions[t] >= s->count) return false;
  return true;
}

}  // namespace lozo
