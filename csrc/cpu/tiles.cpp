#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "threads.h"

namespace lozo {
namespace {

constexpr int64_t kMinTile = 1 << 14, kMaxTile = 1 << 20;  // elements
constexpr int64_t kTilesPerThread = 8;                     // so that the last tiles of all threads end together
constexpr int64_t kElementsPerThread = 1 << 16;            // below, waking a thread costs more than it saves
constexpr int64_t kMinColumns = 1024, kColumnUnit = 64;    // of a tile that has only some of the columns

struct Grid {
  int64_t first;  // index of the first tile
  int64_t tile_rows, tile_cols;
  int64_t down, across;  // tiles in a matrix
};

struct Plan {
  std::vector<lozo_tensor> tensors;
  std::vector<Grid> grids;
  int64_t tiles = 0;
  int64_t elements = 0;
};

struct Run {
  const Plan *plan;
  const Work *work;
  std::atomic<int64_t> next{0};
};

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

lozo_tensor flat(lozo_tensor t) {
  const bool rows_touch = t.rows <= 1 || t.row_stride == t.cols;
  const bool matrices_touch = t.batch <= 1 || t.batch_stride == t.rows * t.cols;
  if (!rows_touch || !matrices_touch || t.col_offset != 0 || t.global_cols != t.cols) return t;
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
  plan.tensors.reserve(work.count);
  plan.grids.reserve(work.count);
  for (int64_t i = 0; i < work.count; ++i) {
    plan.tensors.push_back(work.flatten ? flat(work.tensors[i]) : work.tensors[i]);
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
  Tile tile{&t, index, 0, 0, 0, 0, 0};
  tile.col = rest % g.across * g.tile_cols;
  rest /= g.across;
  tile.row = rest % g.down * g.tile_rows;
  tile.matrix = rest / g.down;
  tile.rows = std::min(g.tile_rows, t.rows - tile.row);
  tile.cols = std::min(g.tile_cols, t.cols - tile.col);
  return tile;
}

void take_tiles(void *context, char *scratch) {
  Run &run = *static_cast<Run *>(context);
  for (;;) {
    const int64_t number = run.next.fetch_add(1, std::memory_order_relaxed);
    if (number >= run.plan->tiles) return;
    run.work->tile(find_tile(*run.plan, number), scratch, run.work->context);
  }
}

}  // namespace

int for_each_tile(const Work &work) {
  try {
    const Plan plan = make_plan(work);
    if (plan.tiles == 0) return LOZO_OK;
    Run run;
    run.plan = &plan;
    run.work = &work;
    const int64_t threads = std::min({work.threads, plan.tiles, 1 + plan.elements / kElementsPerThread});
    return run_on_team(threads, work.scratch_bytes, take_tiles, &run) ? LOZO_OK : LOZO_NO_MEMORY;
  } catch (const std::bad_alloc &) {
    return LOZO_NO_MEMORY;
  }
}

bool valid_call(const lozo_tensor *tensors, int64_t count, const lozo_call *call, bool low_rank) {
  if (count < 0 || call->num_draws < 0 || call->num_draws > LOZO_MAX_DRAWS) return false;
  if (low_rank && count > 0 && (call->rank < 1 || call->rank > LOZO_MAX_RANK)) return false;
  for (int64_t i = 0; i < count; ++i)
    if (tensors[i].dtype < LOZO_FLOAT32 || tensors[i].dtype > LOZO_FLOAT16) return false;
  return true;
}

}  // namespace lozo
