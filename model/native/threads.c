/* A small pool of threads, and scratch memory for each thread.
 *
 * A waiting thread spins a while before it sleeps, since to wake it takes 30 us, as long as many a job of a step. It
 * gives way meanwhile to whoever wants its core.
 */
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "native.h"

enum { MAX_WORKERS = 63, SPIN_NS = 100 * 1000 };

struct job {
    void (*body)(void *, int);
    void *context;
    int count;
    atomic_int next;
};

static pthread_mutex_t pool_in_use = PTHREAD_MUTEX_INITIALIZER; /* one job at a time; others run on their own thread */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;        /* guards what follows */
static pthread_cond_t work_arrived = PTHREAD_COND_INITIALIZER;
static pthread_cond_t work_done = PTHREAD_COND_INITIALIZER;
static struct job job;
static atomic_uint job_number;
static int num_workers, num_invited;
static atomic_int num_busy, num_spinning;

static long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* A moment in which others may have the core; whether it isn't `end` yet. */
static int spin_until(long end) {
    for (int i = 0; i < 8; i++) _mm_pause();
    sched_yield();
    return now_ns() < end;
}

static void run_job(void) {
    for (int i; (i = atomic_fetch_add(&job.next, 1)) < job.count;) job.body(job.context, i);
}

/* Return when the latest job is not number `seen`. The lock is held before and after. */
static void wait_for_job(unsigned seen) {
    pthread_mutex_unlock(&lock);
    atomic_fetch_add(&num_spinning, 1);
    for (long end = now_ns() + SPIN_NS; atomic_load(&job_number) == seen && spin_until(end);) {}
    atomic_fetch_sub(&num_spinning, 1);
    pthread_mutex_lock(&lock);
    while (job_number == seen) pthread_cond_wait(&work_arrived, &lock);
}

static void *worker_main(void *argument) {
    int worker_idx = (int)(intptr_t)argument;
    unsigned seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        wait_for_job(seen);
        seen = job_number;
        if (worker_idx >= num_invited) continue;
        num_busy++;
        pthread_mutex_unlock(&lock);
        run_job();
        pthread_mutex_lock(&lock);
        if (--num_busy == 0) pthread_cond_signal(&work_done);
    }
    return NULL;
}

int threads_are_awake(void) { return atomic_load(&num_spinning) > 0; }

void parallel_for(void (*body)(void *, int), void *context, int count, int num_threads) {
    int helpers = at_most(at_most(num_threads, count) - 1, MAX_WORKERS);
    if (helpers <= 0 || pthread_mutex_trylock(&pool_in_use) != 0) {
        for (int i = 0; i < count; i++) body(context, i);
        return;
    }
    pthread_mutex_lock(&lock);
    while (num_workers < helpers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker_main, (void *)(intptr_t)num_workers) != 0) break;
        pthread_detach(thread);
        num_workers++;
    }
    job.body = body, job.context = context, job.count = count;
    atomic_store(&job.next, 0);
    num_invited = at_most(helpers, num_workers);
    job_number++;
    pthread_cond_broadcast(&work_arrived);
    pthread_mutex_unlock(&lock);
    run_job();
    pthread_mutex_lock(&lock);
    num_invited = 0; /* who wakes only now has nothing left to do, and nobody waits for them */
    pthread_mutex_unlock(&lock);
    for (long end = now_ns() + SPIN_NS; atomic_load(&num_busy) > 0 && spin_until(end);) {}
    pthread_mutex_lock(&lock);
    while (num_busy > 0) pthread_cond_wait(&work_done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&pool_in_use);
}

struct buffers {
    void *memory[NUM_SCRATCH_SLOTS];
    size_t num_bytes[NUM_SCRATCH_SLOTS];
};

static pthread_key_t buffers_key;
static pthread_once_t buffers_key_once = PTHREAD_ONCE_INIT;

static void free_buffers(void *of_ended_thread) {
    struct buffers *buffers = of_ended_thread;
    for (int slot = 0; slot < NUM_SCRATCH_SLOTS; slot++) free(buffers->memory[slot]);
    free(buffers);
}

static void create_buffers_key(void) {
    if (pthread_key_create(&buffers_key, free_buffers) != 0) abort();
}

void *scratch(enum scratch_slot slot, size_t num_bytes) {
    pthread_once(&buffers_key_once, create_buffers_key);
    struct buffers *buffers = pthread_getspecific(buffers_key);
    if (buffers == NULL) {
        buffers = calloc(1, sizeof(struct buffers));
        if (buffers == NULL || pthread_setspecific(buffers_key, buffers) != 0) abort();
    }
    if (buffers->num_bytes[slot] < num_bytes) {
        free(buffers->memory[slot]);
        buffers->num_bytes[slot] = (num_bytes + num_bytes / 4 + 63) / 64 * 64;
        buffers->memory[slot] = aligned_alloc(64, buffers->num_bytes[slot]);
        if (buffers->memory[slot] == NULL) abort();
    }
    return buffers->memory[slot];
}
