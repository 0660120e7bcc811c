/* The loops of cpu_kernels.py: spectral norm of many weights in one parallel region.

   Included by itself once for each type; REAL is the type, NAME(x) the function's name for it.

   With the unnormalised products t = W v and s = W^T t, the new vectors are t / |t| and s / |s|, and sigma is
   |s| / |t|. Both products come from one pass over W: some rows give their part of t, and with it at once
   their part of s, while they are in the cache. A matrix that lies transposed in memory gets the same pass by
   columns. Work is cut into blocks by shape alone, each block has a partial sum of its own, and these are added
   in order: the bits depend neither on the number of threads nor on which thread did what. */

#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* To be changed with what the functions take: a library from before an update would write anywhere. */
const int INTERFACE = 2;

/* One build for every x86-64 machine: the loader picks the widest vectors that it has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VECTORISED
#endif

/* Rows and columns that are transposed together: a cache line of floats. */
#define TILE 16
/* Elements in a block: small enough to share out among threads, large enough to be worth it. */
#define BLOCK 32768
/* Bytes of weights that the last cache holds, roughly, beside what else is read and written with them. */
#define CACHE (8 << 20)
/* Partial sums of a matrix: as many as threads that can work on it at once; each costs a row. */
#define MOST_PARTS 16
#define FEWEST_ROWS 32
/* Rows that go into one partial sum, four at once. */
#define MOST_ROWS 1024
/* Products that go into one sum of a row, before it is added to the others: with few vector lanes (SSE2, NEON)
   the error would else be larger than torch's. */
#define ONE_SUM 2048
/* Sums that grow side by side, each waiting for its own last addition alone. */
#define LANES 32
/* Lengths outside of these are left to the caller: inside, squares and fourth powers of sigma are normal. */
#define SHORTEST 1e-15
#define LONGEST 1e15

/* A weight as a matrix of `rows` rows; row r, column (g, b) at r * row_stride + g * group_stride + b. */
typedef struct {
    int64_t rows, groups, width, row_stride, group_stride;
    int64_t by_rows;      /* iterate: start from the vector of the columns (1) or of the rows (0) */
    int64_t iterations;   /* 0: the vectors at unit length; -1: as they are */
    int64_t taps, channels;  /* of W / sigma in channels_last, whose gradient is to be contiguous; or 0 */
    int64_t transposed;   /* u is the vector of the columns and v that of the rows (1), or the reverse (0) */
    int64_t u_at, v_at;   /* where they stand among the vectors of all sites */
    const int64_t *places;  /* where in the column vector each column stands, or NULL */
    double eps;
} site;

/* The tensors of a site. Forward: W, its old vectors and its new ones, and W / sigma. Backward: W / sigma, its
   vectors, G or NULL, and the gradient of W. */
typedef struct {
    const void *weight, *row_vector, *column_vector, *grad;
    void *new_row_vector, *new_column_vector, *result;
} tensors;

static int64_t at_least(int64_t x, int64_t least) { return x > least ? x : least; }
static int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }
static int64_t columns_of(const site *s) { return s->groups * s->width; }
static int64_t size_of(const site *s) { return s->rows * columns_of(s); }
static int64_t parts(int64_t total, int64_t step) { return (total + step - 1) / step; }

/* Rows of a block of the pass by rows. */
static int64_t row_step(const site *s) {
    int64_t count = at_most(parts(size_of(s), BLOCK), at_most(MOST_PARTS, at_least(s->rows / FEWEST_ROWS, 1)));
    return at_most(parts(s->rows, count), MOST_ROWS);
}

/* Columns of a block of the pass by columns: of one group, or whole groups. */
static int64_t column_step(const site *s) {
    int64_t step = at_least(8 * BLOCK / s->rows, 16);
    if (step >= s->width) return s->width * at_most(at_least(step / s->width, 1), s->groups);
    return at_least(step / 16 * 16, 16);
}

static int64_t steps_in_width(const site *s) {
    return column_step(s) >= s->width ? 1 : parts(s->width, column_step(s));
}

/* Blocks of one pass over a matrix. */
static int64_t blocks_of(const site *s) {
    if (s->by_rows || s->iterations <= 0) return parts(s->rows, row_step(s));
    int64_t step = column_step(s);
    if (step >= s->width) return parts(s->groups, step / s->width);
    return s->groups * steps_in_width(s);
}

/* Rows of a block of the gradient: whole matrices, where these are transposed. */
static int64_t gradient_step(const site *s) {
    int64_t least = s->channels ? parts(s->taps * s->channels, columns_of(s)) : 1;
    return at_least(BLOCK / columns_of(s) / least * least, least);
}

/* Sites worked on together: as many as the cache holds from the first time they are read to the second. */
static int64_t batch_end(const site *sites, int64_t count, int64_t first, int64_t bytes) {
    int64_t last = first, total = 0;
    while (last < count && (last == first || total + size_of(sites + last) * bytes <= CACHE))
        total += size_of(sites + last++) * bytes;
    return last;
}

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

/* y = M x for some rows and, unless z is NULL, z = M^T y for these rows. */
VECTORISED static void NAME(pass_by_rows)(const site *s, const REAL *weight, int64_t first, int64_t last,
                                          const REAL *x, REAL *y, REAL *z) {
    const int64_t stride = s->row_stride, width = s->width;
    if (z) memset(z, 0, columns_of(s) * sizeof(REAL));
    int64_t r = first;
    for (; r + 4 <= last; r += 4) {  /* four rows share each load of x and z */
        double t0 = 0, t1 = 0, t2 = 0, t3 = 0;  /* there may be thousands of groups of a few elements */
        for (int64_t g = 0; g < s->groups; g++) {
            const REAL *w0 = weight + r * stride + g * s->group_stride;
            const REAL *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride, *xg = x + g * width;
            for (int64_t from = 0; from < width; from += ONE_SUM) {
                const int64_t to = at_most(from + ONE_SUM, width);
                REAL sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
                for (int64_t b = from; b < to; b++) {
                    sum0 += w0[b] * xg[b];
                    sum1 += w1[b] * xg[b];
                    sum2 += w2[b] * xg[b];
                    sum3 += w3[b] * xg[b];
                }
                t0 += sum0, t1 += sum1, t2 += sum2, t3 += sum3;
            }
        }
        const REAL y0 = (REAL)t0, y1 = (REAL)t1, y2 = (REAL)t2, y3 = (REAL)t3;
        y[r] = y0, y[r + 1] = y1, y[r + 2] = y2, y[r + 3] = y3;
        for (int64_t g = 0; z && g < s->groups; g++) {
            const REAL *w0 = weight + r * stride + g * s->group_stride;
            const REAL *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
            REAL *zg = z + g * width;
#pragma omp simd
            for (int64_t b = 0; b < width; b++) zg[b] += (y0 * w0[b] + y1 * w1[b]) + (y2 * w2[b] + y3 * w3[b]);
        }
    }
    for (; r < last; r++) {
        double t0 = 0;
        for (int64_t g = 0; g < s->groups; g++) {
            const REAL *w0 = weight + r * stride + g * s->group_stride, *xg = x + g * width;
            for (int64_t from = 0; from < width; from += ONE_SUM) {
                const int64_t to = at_most(from + ONE_SUM, width);
                REAL sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t b = from; b < to; b++) sum += w0[b] * xg[b];
                t0 += sum;
            }
        }
        const REAL y0 = (REAL)t0;
        y[r] = y0;
        for (int64_t g = 0; z && g < s->groups; g++) {
            const REAL *w0 = weight + r * stride + g * s->group_stride;
            REAL *zg = z + g * width;
#pragma omp simd
            for (int64_t b = 0; b < width; b++) zg[b] += y0 * w0[b];
        }
    }
}

/* y = M^T x for the columns [first, last) of some groups, and z = M y for these columns. Of z each group has a few
   products alone, and there may be thousands of groups. */
VECTORISED static void NAME(pass_by_columns)(const site *s, const REAL *weight, int64_t first_group,
                                             int64_t last_group, int64_t first, int64_t last, const REAL *x,
                                             REAL *y, double *z) {
    for (int64_t r = 0; r < s->rows; r++) z[r] = 0;
    for (int64_t g = first_group; g < last_group; g++) {
        const REAL *wg = weight + g * s->group_stride;
        REAL *yg = y + g * s->width;
        for (int64_t b = first; b < last; b++) yg[b] = 0;
        for (int64_t r = 0; r < s->rows; r++) {
            const REAL *w0 = wg + r * s->row_stride, x0 = x[r];
#pragma omp simd
            for (int64_t b = first; b < last; b++) yg[b] += x0 * w0[b];
        }
        for (int64_t r = 0; r < s->rows; r++) {
            const REAL *w0 = wg + r * s->row_stride;
            for (int64_t from = first; from < last; from += ONE_SUM) {
                const int64_t to = at_most(from + ONE_SUM, last);
                REAL z0 = 0;
#pragma omp simd reduction(+ : z0)
                for (int64_t b = from; b < to; b++) z0 += w0[b] * yg[b];
                z[r] += z0;
            }
        }
    }
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

/* (G - c x) / sigma of one row and group. */
VECTORISED static void NAME(gradient_row)(const REAL *grad, REAL c, const REAL *x, REAL sigma, REAL *result,
                                          int64_t n) {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) result[k] = (grad[k] - c * x[k]) / sigma;
}

/* The same of the taps x channels from element `first` on, stored as channels x taps. */
VECTORISED static void NAME(gradient_transposed)(const site *s, const REAL *grad, REAL product,
                                                 const REAL *row_vector, const REAL *column_vector,
                                                 REAL sigma, REAL *result, int64_t first) {
    const int64_t taps = s->taps, channels = s->channels, columns = columns_of(s);
    REAL tile[TILE][TILE];
    for (int64_t c0 = 0; c0 < channels; c0 += TILE)
        for (int64_t t0 = 0; t0 < taps; t0 += TILE) {
            const int64_t width = at_most(TILE, channels - c0), height = at_most(TILE, taps - t0);
            for (int64_t t = 0; t < height; t++) {
                const int64_t at = first + (t0 + t) * channels + c0;
                const REAL *g = grad + at, *x = column_vector + at % columns;
                const REAL c = product * row_vector[at / columns];
#pragma omp simd
                for (int64_t k = 0; k < width; k++) tile[t][k] = (g[k] - c * x[k]) / sigma;
            }
            for (int64_t k = 0; k < width; k++) {
                REAL *to = result + first + (c0 + k) * taps + t0;
                for (int64_t t = 0; t < height; t++) to[t] = tile[t][k];
            }
        }
}

static void NAME(copy_column_vector)(const REAL *from, REAL *to, const int64_t *places, int64_t n) {
    if (!places) memcpy(to, from, n * sizeof(REAL));
    else for (int64_t k = 0; k < n; k++) to[k] = from[places[k]];
}

static void NAME(store_column_vector)(const REAL *from, double length, REAL *to, const int64_t *places,
                                      int64_t n) {
    if (!places) NAME(divide)(from, (REAL)length, to, n);
    else for (int64_t k = 0; k < n; k++) to[places[k]] = from[k] / (REAL)length;
}

/* What a site works on: vectors of the rows and of the columns, and the partial sums of one of them. */
typedef struct {
    REAL *row_vector, *column_vector;
    REAL *of_columns;  /* partial sums of the column vector, by rows */
    double *of_rows;   /* or those of the row vector, by columns */
    int64_t left;    /* iterations still to do */
    int64_t blocks;  /* of this pass, still to do */
} NAME(work);

static void NAME(run_block)(const site *s, const tensors *t, NAME(work) *work, int64_t block) {
    const REAL *weight = t->weight;
    const int64_t columns = columns_of(s);
    if (s->iterations <= 0 || s->by_rows) {
        int64_t step = row_step(s), first = block * step, last = at_most(first + step, s->rows);
        REAL *partial = s->iterations > 0 ? work->of_columns + block * columns : NULL;
        NAME(pass_by_rows)(s, weight, first, last, work->column_vector, work->row_vector, partial);
        return;
    }
    double *partial = work->of_rows + block * s->rows;
    int64_t step = column_step(s), per_group = steps_in_width(s);
    int64_t groups = step >= s->width ? step / s->width : 1;
    int64_t first_group = block / per_group * groups, first = block % per_group * step;
    NAME(pass_by_columns)(s, weight, first_group, at_most(first_group + groups, s->groups), first,
                          at_most(first + step, s->width), work->row_vector, work->column_vector, partial);
}

/* After a pass: the sums of the parts, the lengths, and at the end the new vectors. Returns 0 for a site that
   the caller has to do in another way. */
static int NAME(finish_pass)(const site *s, const tensors *t, NAME(work) *work, double *sigma) {
    const int64_t rows = s->rows, columns = columns_of(s), blocks = blocks_of(s);
    if (s->iterations <= 0) {
        double row_length = sqrt(NAME(inner)(t->row_vector, t->row_vector, rows));
        double column_length = sqrt(NAME(inner)(t->column_vector, t->column_vector, columns));
        *sigma = NAME(inner)(t->row_vector, work->row_vector, rows);
        int plain = row_length > SHORTEST && row_length < LONGEST && column_length > SHORTEST &&
                    column_length < LONGEST && isfinite(*sigma);
        if (!plain) return 0;
        if (s->iterations < 0) row_length = column_length = 1;
        else if (!(row_length > s->eps) || !(column_length > s->eps)) return 0;
        *sigma /= row_length * column_length;
        NAME(divide)(t->row_vector, (REAL)row_length, t->new_row_vector, rows);
        NAME(divide)(t->column_vector, (REAL)column_length, t->new_column_vector, columns);
        return 1;
    }
    REAL *first = s->by_rows ? work->row_vector : work->column_vector;
    REAL *second = s->by_rows ? work->column_vector : work->row_vector;
    int64_t first_size = s->by_rows ? rows : columns, second_size = s->by_rows ? columns : rows;
    if (s->by_rows) {
        memcpy(second, work->of_columns, columns * sizeof(REAL));
        for (int64_t k = 1; k < blocks; k++) NAME(add)(work->of_columns + k * columns, second, columns);
    } else {
        for (int64_t k = 1; k < blocks; k++)
            for (int64_t r = 0; r < rows; r++) work->of_rows[r] += work->of_rows[k * rows + r];
        for (int64_t r = 0; r < rows; r++) second[r] = (REAL)work->of_rows[r];
    }
    double there = sqrt(NAME(inner)(first, first, first_size));
    double back = sqrt(NAME(inner)(second, second, second_size));
    int plain = there > SHORTEST && there < LONGEST && back > SHORTEST && back < LONGEST;  /* false for NaN */
    if (!plain || !(there > s->eps) || !(back / there > s->eps)) return 0;
    *sigma = back / there;
    if (--work->left) {
        NAME(divide)(second, (REAL)back, second, second_size);
        return 1;
    }
    NAME(divide)(work->row_vector, (REAL)(s->by_rows ? there : back), t->new_row_vector, rows);
    NAME(store_column_vector)(work->column_vector, s->by_rows ? back : there, t->new_column_vector, s->places,
                              columns);
    return 1;
}

static int NAME(normalize_batch)(const site *sites, const tensors *all, int64_t count, int64_t threads,
                                 int64_t divides, double *sigmas, int8_t *done) {
    int64_t *starts = malloc((count + 1) * sizeof(int64_t)), *chunks = malloc((count + 1) * sizeof(int64_t));
    NAME(work) *work = malloc(count * sizeof(NAME(work)));
    int64_t total = 0, doubles = 1, rounds = 1, elements = 0;
    for (int64_t k = 0; k < count; k++) {
        const site *s = sites + k;
        total += s->rows + columns_of(s) + (s->by_rows ? blocks_of(s) * columns_of(s) : 0);
        doubles += s->by_rows ? 0 : blocks_of(s) * s->rows;
        rounds = at_least(rounds, s->iterations);
        elements += size_of(s);
    }
    REAL *scratch = malloc(total * sizeof(REAL));
    double *double_scratch = malloc(doubles * sizeof(double));
    if (!starts || !chunks || !work || !scratch || !double_scratch) {
        free(starts), free(chunks), free(work), free(scratch), free(double_scratch);
        return 0;
    }
    REAL *next = scratch;
    double *next_double = double_scratch;
    starts[0] = chunks[0] = 0;
    for (int64_t k = 0; k < count; k++) {
        const site *s = sites + k;
        work[k].left = at_least(s->iterations, 1);
        work[k].blocks = blocks_of(s);
        starts[k + 1] = starts[k] + work[k].blocks;
        chunks[k + 1] = chunks[k] + parts(size_of(s), BLOCK);
        work[k].row_vector = next, next += s->rows;
        work[k].column_vector = next, next += columns_of(s);
        work[k].of_columns = next, next += s->by_rows ? work[k].blocks * columns_of(s) : 0;
        work[k].of_rows = next_double, next_double += s->by_rows ? 0 : work[k].blocks * s->rows;
        if (s->by_rows || s->iterations <= 0)
            NAME(copy_column_vector)(all[k].column_vector, work[k].column_vector, s->places, columns_of(s));
        else
            memcpy(work[k].row_vector, all[k].row_vector, s->rows * sizeof(REAL));
        done[k] = 1;
    }
    threads = at_most(threads, at_least(elements / BLOCK, 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t round = 0; round < rounds; round++) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < starts[count]; b++) {
                int64_t k = find(starts, count, b), last;
                if (!done[k] || work[k].left <= 0) continue;
                NAME(run_block)(sites + k, all + k, work + k, b - starts[k]);
#pragma omp atomic capture seq_cst
                last = --work[k].blocks;
                if (last == 0) {  /* the blocks before it are done, whoever did them */
                    work[k].blocks = starts[k + 1] - starts[k];
                    done[k] = NAME(finish_pass)(sites + k, all + k, work + k, sigmas + k);
                    if (sites[k].iterations <= 0) work[k].left = 0;
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
    free(starts), free(chunks), free(work), free(scratch), free(double_scratch);
    return 1;
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
        starts[k + 1] = starts[k] + (all[k].grad ? parts(s->rows, gradient_step(s)) : 0);
        vectors += columns_of(s);
    }
    double *products = malloc(at_least(chunks[count], 1) * sizeof(double));
    REAL *scratch = malloc(vectors * sizeof(REAL)), **column_vectors = malloc(count * sizeof(REAL *));
    if (!products || !scratch || !column_vectors) {
        free(chunks), free(starts), free(products), free(scratch), free(column_vectors);
        return 0;
    }
    REAL *next = scratch;
    for (int64_t k = 0; k < count; k++) {
        column_vectors[k] = next, next += columns_of(sites + k);
        NAME(copy_column_vector)(all[k].column_vector, column_vectors[k], sites[k].places, columns_of(sites + k));
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
            const REAL *grad = all[k].grad, *row_vector = all[k].row_vector;
            REAL *result = all[k].result;
            double product = 0, sigma = sigmas[k];
            for (int64_t c = chunks[k]; c < chunks[k + 1]; c++) product += products[c];
            if (!(fabs(sigma) > s->eps)) product = 0, sigma = 1;  /* went through undivided */
            int64_t step = gradient_step(s), first = (b - starts[k]) * step;
            int64_t last = at_most(first + step, s->rows), columns = columns_of(s);
            if (s->channels) {
                for (int64_t at = first * columns; at < last * columns; at += s->taps * s->channels)
                    NAME(gradient_transposed)(s, grad, (REAL)product, row_vector, column_vectors[k],
                                              (REAL)sigma, result, at);
                continue;
            }
            for (int64_t r = first; r < last; r++)
                for (int64_t g = 0; g < s->groups; g++) {
                    int64_t at = r * s->row_stride + g * s->group_stride;
                    NAME(gradient_row)(grad + at, (REAL)product * row_vector[r],
                                       column_vectors[k] + g * s->width, (REAL)sigma, result + at, s->width);
                }
        }
    }
    free(chunks), free(starts), free(products), free(scratch), free(column_vectors);
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
                           .row_vector = transposed ? v : u,
                           .column_vector = transposed ? u : v,
                           .new_row_vector = transposed ? new_v : new_u,
                           .new_column_vector = transposed ? new_u : new_v,
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
                           .row_vector = sites[k].transposed ? v : u,
                           .column_vector = sites[k].transposed ? u : v,
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
