/* All SwiGLU experts of one layer over the rows routed to them, in one call. */
#include <string.h>

#include "linear.h"

/* Matrices of expert e: matrices[2 * e] is gate_up [2I, H], gate first; matrices[2 * e + 1] is down [H, I]. */
struct routing {
    const struct weight *const *matrices;
    const float *x;
    int hidden, num_rows;
    int32_t *used_experts; /* those with pairs */
    int32_t *starts;       /* [E + 1]: where each expert's pairs begin in rows and outputs */
    int32_t *rows;         /* [P], sorted by expert */
    int32_t *places;       /* [P]: the place of a pair in that order */
    float *outputs;        /* [P, H], in that order */
    /* for the weighted sum */
    int32_t *row_starts, *row_pairs; /* [N + 1], [P]: the pairs of each row */
    const float *pair_weights;
    float *y_float32;      /* one of the two */
    double *y_float64;
};

static void run_expert(void *context, int i) {
    const struct routing *routing = context;
    int expert = routing->used_experts[i], first = routing->starts[expert];
    const struct weight *gate_up = routing->matrices[2 * expert], *down = routing->matrices[2 * expert + 1];
    int num_rows = routing->starts[expert + 1] - first;
    size_t in_bytes = AT_LEVEL(packed_rows_bytes)(gate_up, num_rows);
    char *memory = scratch(SCRATCH_BODY, in_bytes + AT_LEVEL(activated_bytes)(gate_up, down, num_rows) + 64);
    char *in_memory = take(&memory, in_bytes);
    struct packed_rows rows, activated;
    rows = AT_LEVEL(pack_rows)(gate_up, routing->x, routing->rows + first, num_rows, in_memory, 1);
    activated = AT_LEVEL(activate)(gate_up, down, &rows, memory, 1);
    AT_LEVEL(multiply)(down, &activated, NULL, routing->outputs + (long)first * routing->hidden, 1);
}

enum { SUM_ROWS = 4, SUM_COLUMNS = 512 };

/* y[row] = sum of weight * output over the row's pairs in the order given, for SUM_ROWS rows: the products in float32,
 * the sum in float64, which is then exact in all but freak cases and so the same in any order. */
static void sum_rows(void *context, int i) {
    const struct routing *routing = context;
    int hidden = routing->hidden, last_row = at_most((i + 1) * SUM_ROWS, routing->num_rows);
    double sums[SUM_COLUMNS];
    for (int row = i * SUM_ROWS; row < last_row; row++)
        for (int first = 0; first < hidden; first += SUM_COLUMNS) {
            int n = at_most(SUM_COLUMNS, hidden - first), c;
            memset(sums, 0, n * sizeof(double));
            for (int j = routing->row_starts[row]; j < routing->row_starts[row + 1]; j++) {
                int pair = routing->row_pairs[j];
                const float *output = routing->outputs + (long)routing->places[pair] * hidden + first;
                float weight = routing->pair_weights[pair];
                for (c = 0; c + LANES <= n; c += LANES) add_to_doubles(sums + c, load(output + c) * broadcast(weight));
                for (; c < n; c++) sums[c] += (double)(weight * output[c]);
            }
            long at = (long)row * hidden + first;
            if (routing->y_float64) {
                memcpy(routing->y_float64 + at, sums, n * sizeof(double));
                continue;
            }
            for (c = 0; c + LANES <= n; c += LANES) store(routing->y_float32 + at + c, load_doubles(sums + c));
            for (; c < n; c++) routing->y_float32[at + c] = (float)sums[c];
        }
}

/* Where each number of `keys` [count] goes when they are sorted, those that are equal in their order: places[i]. starts
 * [num_keys + 1]: where each number's begin. */
static void sort(const int64_t *keys, int count, int num_keys, int32_t *starts, int32_t *places) {
    memset(starts, 0, (num_keys + 1) * sizeof(int32_t));
    for (int i = 0; i < count; i++) starts[keys[i] + 1]++;
    for (int k = 0; k < num_keys; k++) starts[k + 1] += starts[k];
    for (int i = 0; i < count; i++) places[i] = starts[keys[i]]++;
    for (int k = num_keys; k > 0; k--) starts[k] = starts[k - 1];
    starts[0] = 0;
}

/* y [num_rows, hidden], float64 or float32, = for each pair, weight * expert(x[row]) added to its row. Returns -1; or,
 * with nothing done, the place of the first pair whose expert is NULL in `matrices` or beyond them. */
int AT_LEVEL(run_experts)(const struct weight *const *matrices, int num_experts, const float *x, int num_rows,
                           int hidden, const int64_t *pair_rows, const int64_t *pair_experts,
                           const float *pair_weights, int num_pairs, void *y, int y_is_float32, int num_threads) {
    for (int p = 0; p < num_pairs; p++)
        if (pair_experts[p] < 0 || pair_experts[p] >= num_experts || !matrices[2 * pair_experts[p]]) return p;
    size_t ints = (size_t)(2 * num_experts + num_rows + 2 + 4 * num_pairs) * sizeof(int32_t) + 6 * 64;
    char *memory = scratch(SCRATCH_CALL, ints + (size_t)num_pairs * hidden * sizeof(float) + 64);
    struct routing routing = {
        .matrices = matrices, .x = x, .hidden = hidden, .num_rows = num_rows, .pair_weights = pair_weights,
        .y_float32 = y_is_float32 ? y : NULL, .y_float64 = y_is_float32 ? NULL : y,
    };
    int32_t *row_places = take(&memory, num_pairs * sizeof(int32_t)), num_used = 0;
    routing.used_experts = take(&memory, num_experts * sizeof(int32_t));
    routing.starts = take(&memory, (num_experts + 1) * sizeof(int32_t));
    routing.rows = take(&memory, num_pairs * sizeof(int32_t));
    routing.places = take(&memory, num_pairs * sizeof(int32_t));
    routing.row_starts = take(&memory, (num_rows + 1) * sizeof(int32_t));
    routing.row_pairs = take(&memory, num_pairs * sizeof(int32_t));
    routing.outputs = take(&memory, (size_t)num_pairs * hidden * sizeof(float));

    sort(pair_experts, num_pairs, num_experts, routing.starts, routing.places);
    sort(pair_rows, num_pairs, num_rows, routing.row_starts, row_places);
    for (int p = 0; p < num_pairs; p++) {
        routing.rows[routing.places[p]] = (int32_t)pair_rows[p];
        routing.row_pairs[row_places[p]] = p;
    }
    for (int e = 0; e < num_experts; e++)
        if (routing.starts[e + 1] > routing.starts[e]) routing.used_experts[num_used++] = e;
    parallel_for(run_expert, &routing, num_used, num_threads);
    parallel_for(sum_rows, &routing, ceil_div(num_rows, SUM_ROWS), num_threads);
    return -1;
}
