/* A binding in C, read once from the plain tuples that runtime/calls/native.py makes of it. */
#ifndef TILEWRIGHT_DESCRIPTION_H
#define TILEWRIGHT_DESCRIPTION_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "cuda_driver.h"
#include "program.h"

enum { TW_MAX_TENSORS = 16, TW_MAX_DIMS = 6, TW_MAX_SYMBOLS = 16, TW_MAX_ARGUMENTS = 32 };
enum { TW_MAX_PARAMETERS = 96, TW_MAX_MAP_RANK = 5, TW_MAX_ATTRIBUTES = 4 };

/* What a guard may read: the sizes, then the address of each tensor, then that of the workspace. */
enum { TW_MAX_GUARD_SYMBOLS = TW_MAX_SYMBOLS + TW_MAX_TENSORS + 1 };

typedef enum { TW_ANY, TW_OFFSETS, TW_INDEX, TW_SLOT, TW_FINITE, TW_LOGITS, TW_RISING, TW_LENGTH, TW_PAGES } tw_value_check;
typedef enum { TW_POSITIONAL, TW_ADDRESS, TW_WORKSPACE, TW_SIZE } tw_argument_kind;

/* What a tensor of a call must be. */
typedef struct {
    uint8_t code, bits; /* DLPack dtype */
    bool optional;
    tw_value_check values;
    tw_program bound; /* empty: none */
    int lengths;      /* of TW_PAGES: position of the tensor that says how much of each row is in use */
    int64_t page_size;
    int ndim;
    int64_t dims[TW_MAX_DIMS]; /* a constant, or -1 - index of a symbol */
} tw_tensor_rule;

/* Memory of a tensor that is passed once, which outputs must not touch. */
typedef struct {
    uintptr_t begin, end;
} tw_range;

/* A tensor map that a GPU's entry takes in place of an address, slowest dimension first, and the last that was made. */
typedef struct {
    int rank, data_type, swizzle, l2_promotion;
    uint64_t element_bytes;
    tw_program shape[TW_MAX_MAP_RANK];
    uint32_t box[TW_MAX_MAP_RANK];
    bool made;
    int64_t made_at, made_shape[TW_MAX_MAP_RANK];
    tw_tensor_map last;
} tw_map;

typedef struct {
    tw_argument_kind kind;
    int64_t value;      /* position of a tensor, or an address */
    tw_program program; /* of TW_SIZE the value, else an offset in bytes; empty: 0 */
    tw_map *map;        /* NULL: none */
} tw_argument;

/* How an entry of a GPU is launched. */
typedef struct {
    tw_program blocks[3], threads[3];
    uint32_t shared_bytes;
    int hidden; /* trailing null pointers */
    int attribute_count;
    tw_launch_attribute attributes[TW_MAX_ATTRIBUTES];
    int parameter_count;
    uint8_t parameter_bytes[TW_MAX_PARAMETERS]; /* what the entry takes */
} tw_grid;

typedef struct {
    uintptr_t entry; /* a tw_entry, or a GPU's function */
    int argument_count;
    tw_argument arguments[TW_MAX_ARGUMENTS];
    tw_grid *grid; /* NULL: the CPU calls it */
} tw_launch;

typedef struct {
    tw_program expression;
    int64_t multiple;
} tw_guard;

typedef struct {
    int64_t max_size;
    int launch_count; /* 0: the fallback serves it */
    tw_launch *launches;
    int guard_count;
    tw_guard *guards;
    bool guards_read_addresses;
    int workspace_guard_count; /* those that can be judged only once there is a workspace */
    tw_guard *workspace_guards;
    tw_program workspace_bytes;
    bool workspace_zeroed;
} tw_variant;

typedef struct {
    int tensor_count, symbol_count, variant_count, range_count;
    int dynamic_symbol;
    int place_symbol; /* that of the CPU's threads, or of the device's multiprocessors */
    int64_t place_value;
    int32_t device_type, device_id; /* DLPack's */
    int output_count, outputs[TW_MAX_TENSORS]; /* positions */
    long long most_workspace_bytes;
    tw_tensor_rule tensors[TW_MAX_TENSORS];
    tw_range ranges[TW_MAX_TENSORS];
    tw_variant *variants;
    struct tw_block *blocks; /* everything allocated for it */
} tw_description;

/* Fill a zeroed description. 0, or -1 with an exception; either way free it with tw_description_free. */
int tw_description_parse(tw_description *description, PyObject *tuple);

void tw_description_free(tw_description *description);

#endif
