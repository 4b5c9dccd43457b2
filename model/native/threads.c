/* A small pool of threads that sleep when idle, and scratch memory for each thread. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "native.h"

enum { MAX_WORKERS = 63 };

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
static unsigned job_number;
static int num_workers, num_invited, num_busy;

static void run_job(void) {
    for (int i; (i = atomic_fetch_add(&job.next, 1)) < job.count;) job.body(job.context, i);
}

static void *worker_main(void *argument) {
    int worker_idx = (int)(intptr_t)argument;
    unsigned last_seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (job_number == last_seen || worker_idx >= num_invited) {
            last_seen = job_number;
            pthread_cond_wait(&work_arrived, &lock);
        }
        last_seen = job_number;
        num_busy++;
        pthread_mutex_unlock(&lock);
        run_job();
        pthread_mutex_lock(&lock);
        if (--num_busy == 0) pthread_cond_signal(&work_done);
    }
    return NULL;
}

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
