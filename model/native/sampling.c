/* One token for each row of logits, exact under top_k, min_p and top_p, without sorting the vocabulary.
 *
 * A token's weight is e^((logit - largest) / temperature), in float64. Tokens are put into buckets by their logit, so
 * that the buckets are in order, and each bucket's mass is summed:
 *
 *   logit    9.1 | 8.7 8.6 | 8.2 8.2 8.1 | ...
 *   mass     1.0 |  1.3    |     1.2     | ...     where do the cumulated weights reach 2.5? In the third.
 *
 * Where top_k ends, where top_p ends and where the random number falls is first a question of buckets, and then of the
 * few tokens of one bucket, which are collected and sorted. A row is read from memory once and then from the cache.
 */
#include <float.h>
#include <string.h>

#include "native.h"
#include "simd.h"

enum { CHUNK = 128, BLOCK = 16, NUM_BUCKETS = 1024, NUM_SUMS = 4 };

/* All tokens lighter than this are together below the rounding of the mass, which is at least 1, and are left out. */
static const double NOTHING = 0x1p-86;

#ifdef __AVX512F__
typedef __m512d dvec;
INLINE dvec widen(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INLINE dvec dbroadcast(double a) { return _mm512_set1_pd(a); }
INLINE void dstore(double *p, dvec a) { _mm512_storeu_pd(p, a); }
INLINE double first_lane(dvec a) { return _mm512_cvtsd_f64(a); }
INLINE dvec dmax(dvec a, dvec b) { return _mm512_max_pd(a, b); }
INLINE dvec dfma_add(dvec a, dvec b, dvec c) { return _mm512_fmadd_pd(a, b, c); }
INLINE dvec low_bits_to_exponent(dvec a) {
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a), 52));
}
INLINE dvec keep_at_least(dvec a, dvec least) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, least, _CMP_GE_OQ), a);
}
INLINE unsigned equal_lanes(ivec a, ivec b) { return _mm512_cmpeq_epi32_mask(a, b); }
#else
typedef __m256d dvec;
INLINE dvec widen(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
INLINE dvec dbroadcast(double a) { return _mm256_set1_pd(a); }
INLINE void dstore(double *p, dvec a) { _mm256_storeu_pd(p, a); }
INLINE double first_lane(dvec a) { return _mm256_cvtsd_f64(a); }
INLINE dvec dmax(dvec a, dvec b) { return _mm256_max_pd(a, b); }
INLINE dvec dfma_add(dvec a, dvec b, dvec c) { return _mm256_fmadd_pd(a, b, c); }
INLINE dvec low_bits_to_exponent(dvec a) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a), 52));
}
INLINE dvec keep_at_least(dvec a, dvec least) { return _mm256_and_pd(a, _mm256_cmp_pd(a, least, _CMP_GE_OQ)); }
INLINE unsigned equal_lanes(ivec a, ivec b) {
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)));
}
#endif

/* What is asked for one row. inverse_temperature 0: the likeliest token. top_k 0: all. */
struct draw {
    double inverse_temperature, top_k, top_p, min_p;
    uint64_t seed, position;
};

struct row {
    const float *logits;
    int num_tokens, num_chunks;
    float *rest;   /* [CHUNK]: the tokens of a last chunk that isn't whole, padded with -inf */
    float *maxima; /* [num_chunks] */
    float largest, smallest;
    double inverse_temperature, least_weight; /* lighter tokens count as 0 */
    float lowest;                             /* no logit below this has least_weight */
    float buckets_per_logit;
    int last, num_in_last; /* the last bucket that is kept, and how many of its tokens are */
    double *masses;        /* [NUM_BUCKETS] */
    double *sums;          /* [NUM_BUCKETS][NUM_SUMS], so that tokens side by side don't wait for each other */
    int32_t *counts;       /* [NUM_BUCKETS] */
    uint64_t *keys;        /* [num_tokens]: the collected bucket's tokens in order, the id in the low half */
    uint64_t *other_keys;
    int collected, num_collected;
};

INLINE const float *chunk_of(const struct row *row, int c) {
    return (c + 1) * CHUNK <= row->num_tokens ? row->logits + c * CHUNK : row->rest;
}

/* Fills maxima, largest (NaN if there is any) and smallest, which is -inf if it isn't known. */
static void read_row(struct row *row) {
    int num_whole = row->num_tokens / CHUNK;
    for (int i = 0; i < CHUNK; i++)
        row->rest[i] = num_whole * CHUNK + i < row->num_tokens ? row->logits[num_whole * CHUNK + i] : -INFINITY;
    int has_nan = 0;
    vec low = broadcast(num_whole > 0 ? INFINITY : -INFINITY);
    row->largest = -INFINITY;
    for (int c = 0; c < row->num_chunks; c++) {
        const float *chunk = chunk_of(row, c);
        vec high = load(chunk), chunk_low = high;
        for (int i = 0; i < CHUNK; i += LANES) {
            vec x = load(chunk + i);
            has_nan |= any_nan(x);
            high = vmax(high, x);
            chunk_low = vmin(chunk_low, x);
        }
        row->maxima[c] = max_of_lanes(high);
        if (row->maxima[c] > row->largest) row->largest = row->maxima[c];
        if (c < num_whole) low = vmin(low, chunk_low);
    }
    row->smallest = -max_of_lanes(broadcast(0.0f) - low);
    if (has_nan) row->largest = NAN;
}

/* The first of the largest. */
static int likeliest(const struct row *row) {
    int c = 0, i = 0;
    while (row->maxima[c] != row->largest) c++;
    while (chunk_of(row, c)[i] != row->largest) i++;
    return c * CHUNK + i;
}

INLINE dvec weights_of(const struct row *row, dvec logits) {
    static const double FACTORIALS[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600};
    const dvec magic = dbroadcast(0x1.8p52 + 1023); /* rounds what is added to an integer, in the low bits, + 1023 */
    dvec x = (logits - dbroadcast(row->largest)) * dbroadcast(row->inverse_temperature);
    x = dmax(x, dbroadcast(-100.0));
    dvec shifted = dfma_add(x, dbroadcast(0x1.71547652b82fep0), magic);
    dvec n = shifted - magic; /* e^x = 2^n e^r */
    dvec r = dfma_add(n, dbroadcast(-0x1.62e42fefa39efp-1), x);
    r = dfma_add(n, dbroadcast(-0x1.abc9e3b39803fp-56), r);
    dvec p = dbroadcast(1 / FACTORIALS[12]);
#pragma GCC unroll 12
    for (int i = 11; i >= 0; i--) p = dfma_add(p, r, dbroadcast(1 / FACTORIALS[i]));
    return keep_at_least(p * low_bits_to_exponent(shifted), dbroadcast(row->least_weight));
}

INLINE ivec buckets_of(const struct row *row, vec logits) {
    vec depth = (broadcast(row->largest) - logits) * broadcast(row->buckets_per_logit);
    return to_int(vmin(depth, broadcast(NUM_BUCKETS - 1)));
}

INLINE int bucket_of(const struct row *row, float logit) {
    return (int)lrintf(fminf((row->largest - logit) * row->buckets_per_logit, NUM_BUCKETS - 1));
}

/* Whether chunk c may hold a token of a bucket up to this one. */
INLINE int reaches(const struct row *row, int c, int bucket) {
    return row->maxima[c] >= row->lowest && bucket_of(row, row->maxima[c]) <= bucket;
}

static void choose_buckets(struct row *row, const struct draw *draw) {
    row->inverse_temperature = draw->inverse_temperature;
    row->least_weight = fmax(draw->min_p, NOTHING);
    double depth = (1e-15 - log(row->least_weight)) * 1.0001 / draw->inverse_temperature; /* more than roundings */
    row->lowest = fmaxf(nextafterf((float)(row->largest - depth), -INFINITY), -FLT_MAX);
    row->buckets_per_logit = fminf(NUM_BUCKETS / fminf((float)depth, row->largest - row->smallest), FLT_MAX);
    row->last = NUM_BUCKETS - 1;
    row->num_in_last = row->num_tokens;
    row->collected = -1;
}

/* Leaves out the buckets after which num_kept tokens are certain, going by the chunks' maxima. */
static void skip_after(struct row *row, int num_kept) {
    memset(row->counts, 0, NUM_BUCKETS * sizeof(int32_t));
    for (int c = 0; c < row->num_chunks; c++) row->counts[bucket_of(row, row->maxima[c])]++;
    int b = 0;
    while (b < row->last && (num_kept -= row->counts[b]) > 0) b++;
    row->last = b;
}

static void fill_buckets(struct row *row, int with_counts) {
    int32_t buckets[BLOCK] __attribute__((aligned(64)));
    double weights[BLOCK] __attribute__((aligned(64)));
    memset(row->sums, 0, NUM_BUCKETS * NUM_SUMS * sizeof(double));
    memset(row->counts, 0, NUM_BUCKETS * sizeof(int32_t));
    for (int c = 0; c < row->num_chunks; c++) {
        if (!reaches(row, c, row->last)) continue;
        for (const float *p = chunk_of(row, c), *end = p + CHUNK; p < end; p += BLOCK) {
            for (int i = 0; i < BLOCK; i += LANES) *(ivec *)(buckets + i) = buckets_of(row, load(p + i));
            for (int i = 0; i < BLOCK; i += LANES / 2) dstore(weights + i, weights_of(row, widen(p + i)));
            for (int i = 0; i < BLOCK; i++) row->sums[buckets[i] * NUM_SUMS + i % NUM_SUMS] += weights[i];
            for (int i = 0; with_counts && i < BLOCK; i++) row->counts[buckets[i]]++;
        }
    }
    for (int b = 0; b <= row->last; b++) {
        const double *sums = row->sums + b * NUM_SUMS;
        row->masses[b] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    while (row->masses[row->last] == 0) row->last--; /* so the last bucket holds a token; the first has the likeliest */
}

/* By the upper half, rising; equals keep their order. */
static void sort_keys(struct row *row, int count) {
    for (int shift = 32; shift < 64; shift += 8) {
        int starts[257] = {0};
        for (int i = 0; i < count; i++) starts[(row->keys[i] >> shift & 255) + 1]++;
        if (starts[(row->keys[0] >> shift & 255) + 1] == count) continue; /* all alike */
        for (int digit = 0; digit < 256; digit++) starts[digit + 1] += starts[digit];
        for (int i = 0; i < count; i++) row->other_keys[starts[row->keys[i] >> shift & 255]++] = row->keys[i];
        uint64_t *sorted = row->other_keys;
        row->other_keys = row->keys, row->keys = sorted;
    }
}

/* Puts a bucket's tokens into `keys`, by falling logit and then by rising id. Returns how many of them are kept. */
static int collect(struct row *row, int bucket) {
    if (row->collected != bucket) {
        int count = 0;
        for (int c = 0; c < row->num_chunks; c++) {
            if (!reaches(row, c, bucket)) continue;
            const float *chunk = chunk_of(row, c);
            for (int first = 0; first < CHUNK; first += LANES) {
                unsigned found = equal_lanes(buckets_of(row, load(chunk + first)), ibroadcast(bucket));
                for (; found != 0; found &= found - 1) {
                    int i = first + __builtin_ctz(found);
                    if (chunk[i] < row->lowest) continue;
                    float logit = chunk[i] + 0.0f; /* makes -0 a 0 */
                    int32_t bits;
                    memcpy(&bits, &logit, sizeof bits);
                    uint32_t falling = (uint32_t)(bits < 0 ? bits : bits ^ 0x7fffffff); /* negative floats rise so */
                    row->keys[count++] = (uint64_t)falling << 32 | (uint32_t)(c * CHUNK + i);
                }
            }
        }
        sort_keys(row, count);
        row->collected = bucket;
        row->num_collected = count;
    }
    return bucket == row->last ? at_most(row->num_collected, row->num_in_last) : row->num_collected;
}

INLINE int token_at(const struct row *row, int i) { return (int)(uint32_t)row->keys[i]; }
INLINE double weight_at(const struct row *row, int i) {
    return first_lane(weights_of(row, dbroadcast(row->logits[token_at(row, i)])));
}

/* Keeps no token after the first num_kept of this bucket, which is collected. */
static void cut(struct row *row, int bucket, int num_kept) {
    row->last = bucket;
    row->num_in_last = num_kept;
    row->masses[bucket] = 0;
    for (int i = 0; i < num_kept; i++) row->masses[bucket] += weight_at(row, i);
}

static void cut_after(struct row *row, int num_kept) {
    int b = 0;
    while (b < row->last && num_kept > row->counts[b]) num_kept -= row->counts[b++];
    cut(row, b, at_most(collect(row, b), num_kept));
}

static double kept_mass(const struct row *row) {
    double mass = 0;
    for (int b = 0; b <= row->last; b++) mass += row->masses[b];
    return mass;
}

/* Where the cumulated weights exceed `goal`, or reach it: the bucket, collected, and *place in it. */
static int find(struct row *row, double goal, int exceed, int *place) {
    double mass = 0;
    int b = 0, i = 0;
    for (; b < row->last; b++) {
        double next = mass + row->masses[b];
        if (exceed ? next > goal : next >= goal) break;
        mass = next;
    }
    int last = collect(row, b) - 1;
    for (double weight = weight_at(row, 0);; i++) {
        mass += weight;
        if (i == last || (exceed ? mass > goal : mass >= goal)) break;
        weight = weight_at(row, i + 1);
        if (weight == 0) break; /* min_p ends here; the bucket's sum was rounded up */
    }
    *place = i;
    return b;
}

/* A number in (0, 1) by seed and position: `uniforms` of model/random_bits.py. */
static double uniform(const struct draw *draw) {
    uint32_t first = (uint32_t)draw->seed, second = draw->seed >> 32, key = (uint32_t)draw->position;
    for (int round = 0; round < 10; round++, key += 0x9E3779B9) { /* Philox2x32-10 */
        uint64_t product = (uint64_t)first * 0xD256D193;
        first = (product >> 32) ^ key ^ second;
        second = (uint32_t)product;
    }
    return (double)(((uint64_t)first << 20 | second >> 12) + 0.5) * 0x1p-52;
}

static int draw_token(struct row *row, const struct draw *draw) {
    int place;
    choose_buckets(row, draw);
    if (draw->top_k > 0 && draw->top_k <= row->num_chunks) skip_after(row, (int)draw->top_k);
    fill_buckets(row, draw->top_k > 0);
    if (draw->top_k > 0 && draw->top_k < row->num_tokens) cut_after(row, (int)draw->top_k);
    if (draw->top_p < 1) {
        int bucket = find(row, draw->top_p * kept_mass(row), 0, &place);
        cut(row, bucket, place + 1);
    }
    find(row, uniform(draw) * kept_mass(row), 1, &place);
    return token_at(row, place);
}

struct draw_call {
    const float *logits;
    int vocab_size;
    const struct draw *draws;
    int64_t *tokens;
    float *largest;
};

static void draw_row(void *context, int r) {
    const struct draw_call *call = context;
    struct row row = {.logits = call->logits + (size_t)r * call->vocab_size, .num_tokens = call->vocab_size};
    row.num_chunks = ceil_div(row.num_tokens, CHUNK);
    size_t maxima_bytes = row.num_chunks * sizeof(float), keys_bytes = row.num_tokens * sizeof(uint64_t);
    size_t bucket_bytes = NUM_BUCKETS * ((NUM_SUMS + 1) * sizeof(double) + sizeof(int32_t));
    char *memory = scratch(SCRATCH_BODY, CHUNK * sizeof(float) + maxima_bytes + bucket_bytes + 2 * keys_bytes + 7 * 64);
    row.rest = take(&memory, CHUNK * sizeof(float));
    row.maxima = take(&memory, maxima_bytes);
    row.masses = take(&memory, NUM_BUCKETS * sizeof(double));
    row.sums = take(&memory, NUM_BUCKETS * NUM_SUMS * sizeof(double));
    row.counts = take(&memory, NUM_BUCKETS * sizeof(int32_t));
    row.keys = take(&memory, keys_bytes);
    row.other_keys = take(&memory, keys_bytes);
    read_row(&row);
    call->largest[r] = row.largest;
    call->tokens[r] = 0;
    if (!isfinite(row.largest)) return;
    const struct draw *draw = call->draws + r;
    call->tokens[r] = draw->inverse_temperature == 0 ? likeliest(&row) : draw_token(&row, draw);
}

/* tokens [R] by logits [R, V] and draws [R]; largest [R]: the largest logit, NaN if there is one. A token means nothing
 * where that isn't finite. */
void AT_LEVEL(draw_tokens)(const float *logits, int num_rows, int vocab_size, const struct draw *draws,
                           int64_t *tokens, float *largest, int num_threads) {
    struct draw_call call = {logits, vocab_size, draws, tokens, largest};
    parallel_for(draw_row, &call, num_rows, num_threads);
}
