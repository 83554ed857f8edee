/* What the parts of the stand-in share: contexts, functions, what was launched, and what became of it. */
#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>

#include "rules.h" /* RULE of a name: the result, having noted which; made of rules.json */

enum { MOST_DEVICES = 8, MOST_PARAMETERS = 96, PARAMETER_BANK = 4096, MOST_LAUNCHES = 256, MOST_ENTRIES = 8 };

struct CUctx_st {
    int device;
};
struct CUfunc_st {
    char name[128];
    int device, registers, static_smem, most_dynamic_smem, parameter_count, bank_bytes;
    unsigned block[3], cluster[3];
    bool any_cluster;
    unsigned offsets[MOST_PARAMETERS], sizes[MOST_PARAMETERS];
    CUmodule module;
};
struct CUmod_st {
    int count;
    struct CUfunc_st entries[MOST_ENTRIES];
    void *image; /* a copy: who executes launches knows a kernel by its binary */
    size_t image_bytes;
};

/* Of one launch; tests/cuda_standin.py has the same structure. */
typedef struct {
    char name[128];
    int device, bank_bytes, cooperative, programmatic, spread;
    unsigned grid[3], block[3], cluster[3], dynamic_smem;
    void *stream;
    unsigned char bank[PARAMETER_BANK], written[PARAMETER_BANK];
} launched;

/* cuda_driver.c */
extern __thread CUcontext current;
extern CUresult lost; /* by a kernel: what every later call of this process answers */
CUresult standin_break(CUresult result, const char *rule);
void standin_lose(CUresult result, const char *why);

#define REQUIRE_CONTEXT()                      \
    do {                                       \
        if (lost) return lost;                 \
        if (!current) return RULE(no_context); \
    } while (0)

/* executing.c: launches that are carried out by this process's Python */
typedef struct {
    const launched *launch;
    const void *image;
    size_t image_bytes;
    const unsigned *offsets, *sizes;
    int parameter_count;
    double cost_ns; /* filled in, as is said */
    char said[512];
} execution;
enum { HANGS = -1 };

bool standin_executes(void);
void standin_attach(void);
int standin_execute(const launched *launch, CUfunction entry, double *cost_ns);
bool standin_foreign_extent(CUdeviceptr pointer, CUdeviceptr *base, size_t *bytes);

/* memory.c */
void standin_forget_memory(size_t bytes);
int standin_extent(CUdeviceptr pointer, CUdeviceptr *base, size_t *bytes);

/* streams.c */
void standin_forget_streams(void);
bool standin_captures(CUstream stream);
bool standin_captures_any(void);
bool standin_is_stream(CUstream stream);
void standin_spoil_captures(void);
CUresult standin_enqueue(const launched *launch, CUfunction entry);
CUresult standin_enqueue_fill(CUstream stream, CUdeviceptr at, unsigned char value, size_t bytes);
CUresult standin_await_all(double transfer_ns);
