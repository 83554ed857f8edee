/* A binding in C, read once from the plain tuples that runtime/calls/native.py makes of it. */
#ifndef TILEWRIGHT_DESCRIPTION_H
#define TILEWRIGHT_DESCRIPTION_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "host.h"
#include "program.h"

enum { TW_MAX_TENSORS = 16, TW_MAX_DIMS = 6, TW_MAX_SYMBOLS = 16, TW_MAX_ARGUMENTS = 32 };

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

typedef struct {
    tw_argument_kind kind;
    int64_t value;      /* position of a tensor, or an address */
    tw_program program; /* of TW_SIZE the value, else an offset in bytes; empty: 0 */
} tw_argument;

typedef struct {
    tw_entry entry;
    int argument_count;
    tw_argument arguments[TW_MAX_ARGUMENTS];
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
    int dynamic_symbol, threads_symbol;
    int output_count, outputs[TW_MAX_TENSORS]; /* positions */
    int32_t threads;
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
