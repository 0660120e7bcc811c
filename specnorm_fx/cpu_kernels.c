/* The loops of cpu_kernels.py: spectral norm of many weights in one parallel region.

   Included by itself once for each type; REAL is the type, NAME(x) the function's name for it.

   A weight lies in memory as outer x inner x width. One of u and v belongs to the inner dimension, the other to the
   two around it: the outer vector has an element for each outer and width. A pass reads the outer rows in turn, each
   of inner x width elements, and takes from them the outer vector, given the inner (gather), or sums of the inner
   one, given the outer (scatter), or both: then a row that has given its part of the outer vector gives at once, while
   it is in the cache, its part of the inner one. So where the outer vector comes first one pass is an iteration, and
   where the inner one does, n iterations take n + 1 passes.

   The outer vector t is not normalised before the inner one s is made of it: sigma is |s| / |t|, or the length of
   the last t, where no s comes behind it. Work is cut into blocks by shape alone, each block has partial sums of its
   own, and these are added in order: the bits depend neither on the number of threads nor on which thread did what. */

#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* To be changed with what the functions take: a library from before an update would write anywhere. */
const int INTERFACE = 3;

/* One build for every x86-64 machine: the loader picks the widest vectors that it has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VECTORISED
#endif

/* Bytes of a cache line, and the rows and columns of floats that are transposed together. */
#define LINE 64
#define TILE 16
/* Elements in a block: small enough to share out among threads, large enough to be worth it. */
#define BLOCK 32768
/* Bytes of weights that the last cache holds, roughly, beside what else is read and written with them. */
#define CACHE (8 << 20)
/* Partial sums of a matrix: as many as threads that can work on it at once; each costs a row. */
#define MOST_PARTS 16
#define FEWEST_ROWS 32
/* Rows that go into one partial sum, TOGETHER at once. */
#define MOST_ROWS 1024
#define TOGETHER 4
/* Products that go into one sum of a row, before it is added to the others: with few vector lanes (SSE2, NEON)
   the error would else be larger than torch's. */
#define ONE_SUM 2048
/* Sums that grow side by side, each waiting for its own last addition alone. */
#define LANES 32
/* Elements of a row that are worked on before the next, roughly. */
#define PERIOD 64
/* Lengths outside of these are left to the caller: inside, squares and fourth powers of sigma are normal. */
#define SHORTEST 1e-15
#define LONGEST 1e15

/* A weight as it lies in memory. */
typedef struct {
    int64_t outer, inner, width;
    int64_t outer_first;  /* an iteration takes the outer vector first (1) or the inner one (0) */
    int64_t iterations;   /* 0: the vectors at unit length; -1: as they are */
    int64_t taps, channels;  /* of W / sigma in channels_last, whose gradient is to be contiguous; or 0 */
    int64_t transposed;   /* u is the inner vector and v the outer one (1), or the reverse (0) */
    int64_t u_at, v_at;   /* where they stand among the vectors of all sites */
    const int64_t *places;  /* where in v each of its elements in the order of memory stands, or NULL */
    double eps;
} site;

/* The tensors of a site. Forward: W, its old vectors and its new ones, and W / sigma. Backward: W / sigma, its
   vectors, G or NULL, and the gradient of W. */
typedef struct {
    const void *weight, *outer_vector, *inner_vector, *grad;
    void *new_outer_vector, *new_inner_vector, *result;
} tensors;

static int64_t at_least(int64_t x, int64_t least) { return x > least ? x : least; }
static int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }
static int64_t row_of(const site *s) { return s->inner * s->width; }
static int64_t size_of(const site *s) { return s->outer * row_of(s); }
static int64_t outer_size(const site *s) { return s->outer * s->width; }
static int64_t parts(int64_t total, int64_t step) { return (total + step - 1) / step; }

/* Outer rows of a block of a pass. */
static int64_t row_step(const site *s) {
    int64_t count = at_most(parts(size_of(s), BLOCK), at_most(MOST_PARTS, at_least(s->outer / FEWEST_ROWS, 1)));
    return at_most(parts(s->outer, count), MOST_ROWS);
}

static int64_t blocks_of(const site *s) { return parts(s->outer, row_step(s)); }

static int64_t passes_of(const site *s) {
    return s->iterations <= 0 ? 1 : s->iterations + !s->outer_first;
}

/* What repeats in a row of some outer vector beside it: `width` elements, as often as makes a loop worth it. */
static int64_t period_of(const site *s) { return s->width * at_least(PERIOD / s->width, 1); }

static int gathers_in(const site *s, int64_t pass) { return pass > 0 || s->outer_first || s->iterations <= 0; }
static int scatters_in(const site *s, int64_t pass) {
    return s->iterations > 0 && (s->outer_first || pass + 1 < passes_of(s));
}

/* What a block writes beside the outer vector: its sums of the inner one, and TOGETHER periods to work with. */
static int64_t partial_size(const site *s) {
    return row_of(s) + (s->width == 1 ? 0 : TOGETHER * period_of(s));
}

static const int64_t *outer_places(const site *s) { return s->transposed ? s->places : NULL; }
static const int64_t *inner_places(const site *s) { return s->transposed ? NULL : s->places; }

/* Rows of a block of the gradient: whole matrices, where these are transposed. */
static int64_t gradient_step(const site *s) {
    int64_t least = s->channels ? parts(s->taps * s->channels, row_of(s)) : 1;
    return at_least(BLOCK / row_of(s) / least * least, least);
}

/* Sites worked on together: as many as the cache holds from the first time they are read to the second. */
static int64_t batch_end(const site *sites, int64_t count, int64_t first, int64_t bytes) {
    int64_t last = first, total = 0;
    while (last < count && (last == first || total + size_of(sites + last) * bytes <= CACHE))
        total += size_of(sites + last++) * bytes;
    return last;
}

static int is_plain(double length) { return length > SHORTEST && length < LONGEST; }  /* false for NaN */

/* Which site the k-th block belongs to, `starts` being the number of blocks before each. */
static int64_t find(const int64_t *starts, int64_t count, int64_t k) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] <= k) low = middle; else high = middle;
    }
    return low;
}

#define REAL float
#define NAME(x) x##_float
#include "cpu_kernels.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(x) x##_double
#include "cpu_kernels.c"

#else /* REAL */

/* The outer vector at TOGETHER rows of width 1: y = <w, x> of each. */
VECTORISED static void NAME(gather)(const REAL *const *w, const REAL *x, int64_t n, REAL *y) {
    const REAL *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    double t0 = 0, t1 = 0, t2 = 0, t3 = 0;
    for (int64_t from = 0; from < n; from += ONE_SUM) {
        const int64_t to = at_most(from + ONE_SUM, n);
        REAL sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
        for (int64_t k = from; k < to; k++) {
            sum0 += w0[k] * x[k];
            sum1 += w1[k] * x[k];
            sum2 += w2[k] * x[k];
            sum3 += w3[k] * x[k];
        }
        t0 += sum0, t1 += sum1, t2 += sum2, t3 += sum3;
    }
    y[0] = (REAL)t0, y[1] = (REAL)t1, y[2] = (REAL)t2, y[3] = (REAL)t3;
}

/* Ask for a part of the rows after the ones in w, n elements each: what is done with these is done in the cache,
   where nothing else would ask for more. */
static inline void NAME(fetch_next)(const REAL *const *w, int64_t n, int64_t first, int64_t last) {
    for (int64_t k = first + TOGETHER * n; k < last + TOGETHER * n; k += LINE / (int64_t)sizeof(REAL))
        for (int64_t i = 0; i < TOGETHER; i++) __builtin_prefetch(w[i] + k, 0, 2);  /* L1 is full */
}

/* What these rows add to the inner vector: z += y w of each. */
VECTORISED static void NAME(scatter)(const REAL *const *w, const REAL *y, int64_t n, REAL *z) {
    const REAL *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    const REAL y0 = y[0], y1 = y[1], y2 = y[2], y3 = y[3];
    for (int64_t from = 0; from < n; from += PERIOD) {
        const int64_t to = at_most(from + PERIOD, n);
        NAME(fetch_next)(w, n, from, to);
#pragma omp simd
        for (int64_t k = from; k < to; k++) z[k] += (y0 * w0[k] + y1 * w1[k]) + (y2 * w2[k] + y3 * w3[k]);
    }
}

/* `gather` where width is not 1: sums of what is a period apart, for each row. x has every element `width` times. */
VECTORISED static void NAME(gather_periods)(const REAL *const *w, const REAL *x, int64_t n, int64_t period,
                                            REAL *sums) {
    REAL *sum0 = sums, *sum1 = sums + period, *sum2 = sums + 2 * period, *sum3 = sums + 3 * period;
    memset(sums, 0, TOGETHER * period * sizeof(REAL));
    for (int64_t from = 0; from < n; from += period) {
        const REAL *w0 = w[0] + from, *w1 = w[1] + from, *w2 = w[2] + from, *w3 = w[3] + from, *x0 = x + from;
        const int64_t to = at_most(period, n - from);
#pragma omp simd
        for (int64_t k = 0; k < to; k++) {
            sum0[k] += w0[k] * x0[k];
            sum1[k] += w1[k] * x0[k];
            sum2[k] += w2[k] * x0[k];
            sum3[k] += w3[k] * x0[k];
        }
    }
}

/* `scatter` where width is not 1: y has a period of each row, and z every element `width` times. */
VECTORISED static void NAME(scatter_periods)(const REAL *const *w, const REAL *y, int64_t n, int64_t period,
                                             REAL *z) {
    const REAL *y0 = y, *y1 = y + period, *y2 = y + 2 * period, *y3 = y + 3 * period;
    for (int64_t from = 0; from < n; from += period) {
        const REAL *w0 = w[0] + from, *w1 = w[1] + from, *w2 = w[2] + from, *w3 = w[3] + from;
        const int64_t to = at_most(period, n - from);
        REAL *z0 = z + from;
        NAME(fetch_next)(w, n, from, from + to);
#pragma omp simd
        for (int64_t k = 0; k < to; k++) z0[k] += (y0[k] * w0[k] + y1[k] * w1[k]) + (y2[k] * w2[k] + y3[k] * w3[k]);
    }
}

/* One period of a row: its `width` elements of the outer vector again and again. */
static void NAME(repeat)(const REAL *from, int64_t width, int64_t period, REAL *to) {
    for (int64_t k = 0; k < period; k += width) memcpy(to + k, from, width * sizeof(REAL));
}

/* Every element of the inner vector `width` times. */
static void NAME(spread)(const REAL *from, int64_t inner, int64_t width, REAL *to) {
    for (int64_t k = 0; k < inner; k++)
        for (int64_t b = 0; b < width; b++) to[k * width + b] = from[k];
}

VECTORISED static double NAME(inner)(const REAL *x, const REAL *y, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++) sum += (double)x[k] * y[k];
    return sum;
}

/* The same of matrices, for which `inner` would wait for its additions and not for the memory. */
VECTORISED static double NAME(inner_of_matrices)(const REAL *x, const REAL *y, int64_t n) {
    double total = 0;
    int64_t k = 0;
    while (n - k >= LANES) {
        const int64_t to = at_most(k + ONE_SUM, n - LANES + 1);
        REAL sums[LANES] = {0};
        for (; k < to; k += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) sums[lane] += x[k + lane] * y[k + lane];
        for (int64_t lane = 0; lane < LANES; lane++) total += sums[lane];
    }
    return total + NAME(inner)(x + k, y + k, n - k);
}

VECTORISED static void NAME(divide)(const REAL *x, REAL divisor, REAL *result, int64_t n) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) result[k] = x[k] / divisor;
}

VECTORISED static void NAME(add)(const REAL *x, REAL *sum, int64_t n) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) sum[k] += x[k];
}

/* (G - c x) / sigma of one row of width 1. */
VECTORISED static void NAME(gradient_row)(const REAL *grad, REAL c, const REAL *x, REAL sigma, REAL *result,
                                          int64_t n) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) result[k] = (grad[k] - c * x[k]) / sigma;
}

/* Of any width: y has a period of the outer vector, and x every element `width` times. */
VECTORISED static void NAME(gradient_periods)(const REAL *grad, REAL product, const REAL *y, const REAL *x,
                                              REAL sigma, REAL *result, int64_t n, int64_t period) {
    for (int64_t from = 0; from < n; from += period) {
        const REAL *g0 = grad + from, *x0 = x + from;
        const int64_t to = at_most(period, n - from);
        REAL *result0 = result + from;
#pragma omp simd
        for (int64_t k = 0; k < to; k++) result0[k] = (g0[k] - product * y[k] * x0[k]) / sigma;
    }
}

/* The same of the taps x channels from element `first` on, stored as channels x taps. */
VECTORISED static void NAME(gradient_transposed)(const site *s, const REAL *grad, REAL product,
                                                 const REAL *outer, const REAL *inner, REAL sigma,
                                                 REAL *result, int64_t first) {
    const int64_t taps = s->taps, channels = s->channels;
    REAL tile[TILE][TILE];
    for (int64_t c0 = 0; c0 < channels; c0 += TILE)
        for (int64_t t0 = 0; t0 < taps; t0 += TILE) {
            const int64_t width = at_most(TILE, channels - c0), height = at_most(TILE, taps - t0);
            for (int64_t t = 0; t < height; t++) {
                const int64_t at = first + (t0 + t) * channels + c0;
                const REAL *g = grad + at, *x = inner + at % s->inner;
                const REAL c = product * outer[at / s->inner];
#pragma omp simd
                for (int64_t k = 0; k < width; k++) tile[t][k] = (g[k] - c * x[k]) / sigma;
            }
            for (int64_t k = 0; k < width; k++) {
                REAL *to = result + first + (c0 + k) * taps + t0;
                for (int64_t t = 0; t < height; t++) to[t] = tile[t][k];
            }
        }
}

/* A stored vector in the order of memory, `places` being those of v or NULL, and back. */
static void NAME(load)(const REAL *from, const int64_t *places, int64_t n, REAL *to) {
    if (!places) memcpy(to, from, n * sizeof(REAL));
    else for (int64_t k = 0; k < n; k++) to[k] = from[places[k]];
}

static void NAME(store)(const REAL *from, double length, const int64_t *places, int64_t n, REAL *to) {
    if (!places) NAME(divide)(from, (REAL)length, to, n);
    else for (int64_t k = 0; k < n; k++) to[places[k]] = from[k] / (REAL)length;
}

/* What a site works on. */
typedef struct {
    REAL *outer, *inner;
    REAL *stored;    /* the outer vector that was given, in the order of memory, without iterations */
    REAL *spread;    /* inner, every element `width` times; inner itself where that is 1 */
    REAL *partials;  /* of each block */
    int64_t pass;    /* which one is due */
    int64_t blocks;  /* of it, still to do */
} NAME(work);

static void NAME(run_block)(const site *s, const tensors *t, const NAME(work) *work, int64_t block) {
    const int64_t row = row_of(s), width = s->width, step = row_step(s), period = period_of(s);
    const int64_t first = block * step, last = at_most(first + step, s->outer);
    const int gathers = gathers_in(s, work->pass), scatters = scatters_in(s, work->pass);
    REAL *partial = work->partials + block * partial_size(s), *periods = partial + row;
    if (scatters) memset(partial, 0, row * sizeof(REAL));
    for (int64_t r = first; r < last; r += TOGETHER) {
        /* Where rows are missing at the end the last one stands for them, and its sums are not used. */
        const int64_t rows = at_most(TOGETHER, last - r);
        const REAL *w[TOGETHER];
        for (int64_t i = 0; i < TOGETHER; i++) w[i] = (const REAL *)t->weight + at_most(r + i, last - 1) * row;
        REAL *outer = work->outer + r * width;
        if (width == 1) {
            REAL y[TOGETHER];
            if (gathers) NAME(gather)(w, work->inner, row, y), memcpy(outer, y, rows * sizeof(REAL));
            for (int64_t i = 0; i < TOGETHER; i++) y[i] = i < rows ? outer[i] : 0;
            if (scatters) NAME(scatter)(w, y, row, partial);
            continue;
        }
        if (gathers) {
            NAME(gather_periods)(w, work->spread, row, period, periods);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t b = 0; b < width; b++) {
                    double sum = 0;
                    for (int64_t k = b; k < period; k += width) sum += periods[i * period + k];
                    outer[i * width + b] = (REAL)sum;
                }
        }
        if (scatters) {
            memset(periods, 0, TOGETHER * period * sizeof(REAL));
            for (int64_t i = 0; i < rows; i++)
                NAME(repeat)(outer + i * width, width, period, periods + i * period);
            NAME(scatter_periods)(w, periods, row, period, partial);
        }
    }
}

/* Without iterations: sigma of the stored vectors, which are brought to unit length or not. */
static int NAME(finish_stored)(const site *s, const tensors *t, const NAME(work) *work, double *sigma) {
    const int64_t outer_n = outer_size(s);
    double outer_length = sqrt(NAME(inner)(work->stored, work->stored, outer_n));
    double inner_length = sqrt(NAME(inner)(work->inner, work->inner, s->inner));
    *sigma = NAME(inner)(work->stored, work->outer, outer_n);
    if (!is_plain(outer_length) || !is_plain(inner_length) || !isfinite(*sigma)) return 0;
    if (s->iterations < 0) outer_length = inner_length = 1;
    else if (!(outer_length > s->eps) || !(inner_length > s->eps)) return 0;
    *sigma /= outer_length * inner_length;
    NAME(divide)(t->outer_vector, (REAL)outer_length, t->new_outer_vector, outer_n);
    NAME(divide)(t->inner_vector, (REAL)inner_length, t->new_inner_vector, s->inner);
    return 1;
}

/* After a pass: the sums of the parts, the lengths, and at the end the new vectors. Returns 0 for a site that
   the caller has to do in another way. */
static int NAME(finish_pass)(const site *s, const tensors *t, NAME(work) *work, double *sigma) {
    const int64_t row = row_of(s), width = s->width;
    double outer_length = 1;
    if (s->iterations <= 0) return NAME(finish_stored)(s, t, work, sigma);
    if (gathers_in(s, work->pass)) {
        *sigma = outer_length = sqrt(NAME(inner)(work->outer, work->outer, outer_size(s)));
        if (!is_plain(outer_length) || !(outer_length > s->eps)) return 0;
    }
    if (scatters_in(s, work->pass)) {
        memcpy(work->spread, work->partials, row * sizeof(REAL));
        for (int64_t k = 1; k < blocks_of(s); k++)
            NAME(add)(work->partials + k * partial_size(s), work->spread, row);
        for (int64_t k = 0; width > 1 && k < s->inner; k++) {
            double sum = 0;
            for (int64_t b = 0; b < width; b++) sum += work->spread[k * width + b];
            work->inner[k] = (REAL)sum;
        }
        double inner_length = sqrt(NAME(inner)(work->inner, work->inner, s->inner));
        if (!is_plain(inner_length) || !(inner_length / outer_length > s->eps)) return 0;
        *sigma = inner_length / outer_length;
        NAME(divide)(work->inner, (REAL)inner_length, work->inner, s->inner);
    }
    if (++work->pass < passes_of(s)) {
        if (width > 1) NAME(spread)(work->inner, s->inner, width, work->spread);
        return 1;
    }
    NAME(store)(work->outer, outer_length, outer_places(s), outer_size(s), t->new_outer_vector);
    NAME(store)(work->inner, 1, inner_places(s), s->inner, t->new_inner_vector);
    return 1;
}

static int NAME(normalize_batch)(const site *sites, const tensors *all, int64_t count, int64_t threads,
                                 int64_t divides, double *sigmas, int8_t *done) {
    int64_t *starts = malloc((count + 1) * sizeof(int64_t)), *chunks = malloc((count + 1) * sizeof(int64_t));
    NAME(work) *work = malloc(count * sizeof(NAME(work)));
    int64_t total = 0, rounds = 1, elements = 0;
    for (int64_t k = 0; k < count; k++) {
        const site *s = sites + k;
        total += 2 * outer_size(s) + s->inner + row_of(s) + blocks_of(s) * partial_size(s);
        rounds = at_least(rounds, passes_of(s));
        elements += size_of(s);
    }
    REAL *scratch = malloc(total * sizeof(REAL));
    if (!starts || !chunks || !work || !scratch) {
        free(starts), free(chunks), free(work), free(scratch);
        return 0;
    }
    REAL *next = scratch;
    starts[0] = chunks[0] = 0;
    for (int64_t k = 0; k < count; k++) {
        const site *s = sites + k;
        NAME(work) *w = work + k;
        w->pass = 0;
        w->blocks = blocks_of(s);
        starts[k + 1] = starts[k] + w->blocks;
        chunks[k + 1] = chunks[k] + parts(size_of(s), BLOCK);
        w->outer = next, next += outer_size(s);
        w->stored = next, next += outer_size(s);
        w->inner = next, next += s->inner;
        w->spread = s->width == 1 ? w->inner : next, next += row_of(s);
        w->partials = next, next += w->blocks * partial_size(s);
        if (gathers_in(s, 0)) {
            NAME(load)(all[k].inner_vector, inner_places(s), s->inner, w->inner);
            if (s->width > 1) NAME(spread)(w->inner, s->inner, s->width, w->spread);
        }
        if (s->iterations <= 0) NAME(load)(all[k].outer_vector, outer_places(s), outer_size(s), w->stored);
        else if (!s->outer_first) NAME(load)(all[k].outer_vector, outer_places(s), outer_size(s), w->outer);
        done[k] = 1;
    }
    threads = at_most(threads, at_least(elements / BLOCK, 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t round = 0; round < rounds; round++) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < starts[count]; b++) {
                int64_t k = find(starts, count, b), last;
                if (!done[k] || round >= passes_of(sites + k)) continue;
                NAME(run_block)(sites + k, all + k, work + k, b - starts[k]);
#pragma omp atomic capture seq_cst
                last = --work[k].blocks;
                if (last == 0) {  /* the blocks before it are done, whoever did them */
                    work[k].blocks = starts[k + 1] - starts[k];
                    done[k] = NAME(finish_pass)(sites + k, all + k, work + k, sigmas + k);
                }
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < (divides ? chunks[count] : 0); c++) {
            int64_t k = find(chunks, count, c), first = (c - chunks[k]) * BLOCK;
            if (!done[k]) continue;
            int64_t size = at_most(BLOCK, size_of(sites + k) - first);
            REAL divisor = fabs(sigmas[k]) > sites[k].eps ? (REAL)sigmas[k] : 1;
            NAME(divide)((const REAL *)all[k].weight + first, divisor, (REAL *)all[k].result + first, size);
        }
    }
    free(starts), free(chunks), free(work), free(scratch);
    return 1;
}

static void NAME(gradient_rows)(const site *s, const tensors *t, const NAME(work) *work, REAL product, REAL sigma,
                                int64_t first, int64_t last) {
    const int64_t row = row_of(s), width = s->width, period = period_of(s);
    const REAL *grad = t->grad;
    REAL *result = t->result, repeated[PERIOD];
    if (s->channels) {
        for (int64_t at = first * row; at < last * row; at += s->taps * s->channels)
            NAME(gradient_transposed)(s, grad, product, work->outer, work->inner, sigma, result, at);
        return;
    }
    for (int64_t r = first; r < last; r++) {
        const REAL *outer = work->outer + r * width;
        if (width == 1) {
            NAME(gradient_row)(grad + r * row, product * outer[0], work->inner, sigma, result + r * row, row);
            continue;
        }
        if (width < PERIOD) NAME(repeat)(outer, width, period, repeated), outer = repeated;
        NAME(gradient_periods)(grad + r * row, product, outer, work->spread, sigma, result + r * row, row, period);
    }
}

static int NAME(backward_batch)(const site *sites, const tensors *all, int64_t count, int64_t threads,
                                const double *sigmas) {
    int64_t *chunks = malloc((count + 1) * sizeof(int64_t)), *starts = malloc((count + 1) * sizeof(int64_t));
    int64_t vectors = 0;
    if (!chunks || !starts) {
        free(chunks), free(starts);
        return 0;
    }
    chunks[0] = starts[0] = 0;
    for (int64_t k = 0; k < count; k++) {
        const site *s = sites + k;
        chunks[k + 1] = chunks[k] + (all[k].grad ? parts(size_of(s), BLOCK) : 0);
        starts[k + 1] = starts[k] + (all[k].grad ? parts(s->outer, gradient_step(s)) : 0);
        vectors += outer_size(s) + s->inner + row_of(s);
    }
    double *products = malloc(at_least(chunks[count], 1) * sizeof(double));
    REAL *scratch = malloc(vectors * sizeof(REAL)), *next = scratch;
    NAME(work) *work = malloc(count * sizeof(NAME(work)));
    if (!products || !scratch || !work) {
        free(chunks), free(starts), free(products), free(scratch), free(work);
        return 0;
    }
    for (int64_t k = 0; k < count; k++) {
        const site *s = sites + k;
        NAME(work) *w = work + k;
        w->outer = next, next += outer_size(s);
        w->inner = next, next += s->inner;
        w->spread = s->width == 1 ? w->inner : next, next += row_of(s);
        NAME(load)(all[k].outer_vector, outer_places(s), outer_size(s), w->outer);
        NAME(load)(all[k].inner_vector, inner_places(s), s->inner, w->inner);
        if (s->width > 1) NAME(spread)(w->inner, s->inner, s->width, w->spread);
    }
    threads = at_most(threads, at_least(chunks[count], 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < chunks[count]; c++) {
            int64_t k = find(chunks, count, c), first = (c - chunks[k]) * BLOCK;
            int64_t size = at_most(BLOCK, size_of(sites + k) - first);
            products[c] = NAME(inner_of_matrices)((const REAL *)all[k].grad + first,
                                                  (const REAL *)all[k].weight + first, size);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < starts[count]; b++) {
            int64_t k = find(starts, count, b);
            const site *s = sites + k;
            double product = 0, sigma = sigmas[k];
            for (int64_t c = chunks[k]; c < chunks[k + 1]; c++) product += products[c];
            if (!(fabs(sigma) > s->eps)) product = 0, sigma = 1;  /* went through undivided */
            int64_t step = gradient_step(s), first = (b - starts[k]) * step;
            NAME(gradient_rows)(s, all + k, work + k, (REAL)product, (REAL)sigma, first,
                                at_most(first + step, s->outer));
        }
    }
    free(chunks), free(starts), free(products), free(scratch), free(work);
    return 1;
}

/* `addresses`: of all W, all u, all v and, if it divides, all W / sigma. Sites for which 0 is put into `done` are
   the caller's. Returns 0 if there is no memory. */
int NAME(normalize)(const site *sites, void *const *addresses, int64_t count, int64_t threads, int64_t divides,
                    REAL *vectors, double *sigmas, int8_t *done) {
    tensors *all = malloc(count * sizeof(tensors));
    if (!all) return 0;
    for (int64_t k = 0; k < count; k++) {
        const void *u = addresses[count + k], *v = addresses[2 * count + k];
        REAL *new_u = vectors + sites[k].u_at, *new_v = vectors + sites[k].v_at;
        const int transposed = (int)sites[k].transposed;
        all[k] = (tensors){.weight = addresses[k],
                           .outer_vector = transposed ? v : u,
                           .inner_vector = transposed ? u : v,
                           .new_outer_vector = transposed ? new_v : new_u,
                           .new_inner_vector = transposed ? new_u : new_v,
                           .result = divides ? addresses[3 * count + k] : NULL};
    }
    int has_memory = 1;
    for (int64_t first = 0, last; has_memory && first < count; first = last) {
        last = batch_end(sites, count, first, sizeof(REAL));
        has_memory = NAME(normalize_batch)(sites + first, all + first, last - first, threads, divides,
                                           sigmas + first, done + first);
    }
    free(all);
    return has_memory;
}

/* (G - <G, W / sigma> u v^T) / sigma. `addresses`: of all W / sigma, all G and all results, the latter two NULL
   where there is no gradient. Returns 0 if there is no memory. */
int NAME(normalize_backward)(const site *sites, void *const *addresses, int64_t count, int64_t threads,
                             const REAL *vectors, const double *sigmas) {
    tensors *all = malloc(count * sizeof(tensors));
    if (!all) return 0;
    for (int64_t k = 0; k < count; k++) {
        const REAL *u = vectors + sites[k].u_at, *v = vectors + sites[k].v_at;
        all[k] = (tensors){.weight = addresses[k],
                           .outer_vector = sites[k].transposed ? v : u,
                           .inner_vector = sites[k].transposed ? u : v,
                           .grad = addresses[count + k],
                           .result = addresses[2 * count + k]};
    }
    int has_memory = 1;
    for (int64_t first = 0, last; has_memory && first < count; first = last) {
        last = batch_end(sites, count, first, sizeof(REAL));
        has_memory = NAME(backward_batch)(sites + first, all + first, last - first, threads, sigmas + first);
    }
    free(all);
    return has_memory;
}

#endif
