/* All SwiGLU experts of one layer over the rows routed to them, in one call. */
#include <string.h>

#include "linear.h"

/* Matrices of expert e: matrices[2 * e] is gate_up [2I, H], gate first; matrices[2 * e + 1] is down [H, I]. */
struct routing {
    const struct weight *const *matrices;
    const float *x;
    int hidden;
    int num_used;
    int32_t *used_experts; /* those with pairs */
    int32_t *starts;       /* [num_used + 1]: where their pairs begin in rows and outputs */
    int32_t *rows;         /* [P], sorted by expert */
    int32_t *places;       /* [P]: the place of a pair in that order */
    float *outputs;        /* [P, H], in that order */
    /* for the weighted sum */
    const int64_t *pair_rows;
    const float *pair_weights;
    int num_pairs;
    double *y;
};

static void run_expert(void *context, int i) {
    const struct routing *routing = context;
    const struct weight *gate_up = routing->matrices[2 * routing->used_experts[i]];
    const struct weight *down = routing->matrices[2 * routing->used_experts[i] + 1];
    int first = routing->starts[i], num_rows = routing->starts[i + 1] - first, inner = down->num_inputs;
    size_t in_bytes = AT_LEVEL(packed_rows_bytes)(gate_up, num_rows);
    size_t inner_bytes = AT_LEVEL(packed_rows_bytes)(down, num_rows);
    size_t h_bytes = (size_t)num_rows * inner * sizeof(float);
    char *memory = scratch(SCRATCH_BODY, in_bytes + inner_bytes + 3 * h_bytes + 4 * 64);
    char *packed_in = take(&memory, in_bytes), *packed_inner = take(&memory, inner_bytes);
    float *h = take(&memory, 2 * h_bytes), *activated = take(&memory, h_bytes);

    struct packed_rows rows = AT_LEVEL(pack_rows)(gate_up, routing->x, routing->rows + first, num_rows, packed_in);
    struct packed_rows inner_rows;
    if (AT_LEVEL(activates)(gate_up, down)) {
        inner_rows = AT_LEVEL(lay_out)(down, num_rows, packed_inner);
        AT_LEVEL(activate_by_all)(gate_up, &rows, &inner_rows, 1);
    } else {
        AT_LEVEL(multiply)(gate_up, &rows, NULL, h, 0, num_panels(gate_up));
        for (int r = 0; r < num_rows; r++)
            AT_LEVEL(swiglu_row)(h + (long)r * 2 * inner, inner, activated + (long)r * inner);
        inner_rows = AT_LEVEL(pack_rows)(down, activated, NULL, num_rows, packed_inner);
    }
    AT_LEVEL(multiply)(down, &inner_rows, NULL, routing->outputs + (long)first * routing->hidden, 0, num_panels(down));
}

enum { SUM_COLUMNS = 128 };

/* y[row] += weight * output, pair by pair in the order given, for SUM_COLUMNS columns: the product in float32, the sum
 * in float64, which is then exact in all but freak cases and so the same in any order. */
static void sum_columns(void *context, int i) {
    const struct routing *routing = context;
    int first = i * SUM_COLUMNS, n = at_most(SUM_COLUMNS, routing->hidden - first);
    for (int p = 0; p < routing->num_pairs; p++) {
        double *y = routing->y + routing->pair_rows[p] * routing->hidden + first;
        const float *output = routing->outputs + (long)routing->places[p] * routing->hidden + first;
        float weight = routing->pair_weights[p];
        int c = 0;
        for (; c + LANES <= n; c += LANES) add_to_doubles(y + c, load(output + c) * broadcast(weight));
        for (; c < n; c++) y[c] += (double)(weight * output[c]);
    }
}

/* y [num_rows, hidden] = for each pair, weight * expert(x[row]) added to its row. Experts that no pair names may be
 * NULL in `matrices`. */
void AT_LEVEL(run_experts)(const struct weight *const *matrices, int num_experts, const float *x, int num_rows,
                           int hidden, const int64_t *pair_rows, const int64_t *pair_experts,
                           const float *pair_weights, int num_pairs, double *y, int num_threads) {
    size_t ints = (size_t)(3 * num_experts + 2 + 2 * num_pairs + 5 * 16) * sizeof(int32_t);
    char *memory = scratch(SCRATCH_CALL, ints + (size_t)num_pairs * hidden * sizeof(float) + 64);
    struct routing routing = {
        .matrices = matrices, .x = x, .hidden = hidden, .pair_rows = pair_rows, .pair_weights = pair_weights,
        .num_pairs = num_pairs, .y = y,
    };
    int32_t *next_place = take(&memory, num_experts * sizeof(int32_t));
    routing.used_experts = take(&memory, num_experts * sizeof(int32_t));
    routing.starts = take(&memory, (num_experts + 1) * sizeof(int32_t));
    routing.rows = take(&memory, num_pairs * sizeof(int32_t));
    routing.places = take(&memory, num_pairs * sizeof(int32_t));
    routing.outputs = take(&memory, (size_t)num_pairs * hidden * sizeof(float));

    memset(next_place, 0, num_experts * sizeof(int32_t));
    for (int p = 0; p < num_pairs; p++) next_place[pair_experts[p]]++;
    routing.starts[0] = 0;
    for (int e = 0; e < num_experts; e++) {
        int count = next_place[e], start = routing.starts[routing.num_used];
        next_place[e] = start;
        if (count == 0) continue;
        routing.used_experts[routing.num_used] = e;
        routing.starts[++routing.num_used] = start + count;
    }
    for (int p = 0; p < num_pairs; p++) {
        routing.places[p] = next_place[pair_experts[p]]++;
        routing.rows[routing.places[p]] = (int32_t)pair_rows[p];
    }
    parallel_for(run_expert, &routing, routing.num_used, num_threads);
    memset(y, 0, (size_t)num_rows * hidden * sizeof(double));
    parallel_for(sum_columns, &routing, ceil_div(hidden, SUM_COLUMNS), num_threads);
}
