#include "description.h"

#include <stddef.h>

struct tw_block {
    struct tw_block *next;
    max_align_t memory[];
};

static void *allocate(tw_description *description, size_t count, size_t size) {
    struct tw_block *block = PyMem_Calloc(1, sizeof(struct tw_block) + count * size);
    if (block == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    block->next = description->blocks;
    description->blocks = block;
    return block->memory;
}

void tw_description_free(tw_description *description) {
    while (description->blocks != NULL) {
        struct tw_block *block = description->blocks;
        description->blocks = block->next;
        PyMem_Free(block);
    }
}

/* Length of a tuple that may have up to `most` items; -1 with an exception. */
static int length_of(PyObject *tuple, Py_ssize_t most) {
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "a binding is described by tuples");
        return -1;
    }
    Py_ssize_t length = PyTuple_GET_SIZE(tuple);
    if (length > most) {
        PyErr_Format(PyExc_ValueError, "a binding has %zd parts of a kind; at most %zd are possible", length, most);
        return -1;
    }
    return (int)length;
}

static int parse_program_over(tw_description *description, PyObject *tuple, int symbols, tw_program *program) {
    int length = length_of(tuple, 4096);
    int64_t *code = length < 0 ? NULL : allocate(description, (size_t)length, sizeof(int64_t));
    if (code == NULL) {
        return -1;
    }
    for (int i = 0; i < length; i++) {
        code[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
        if (code[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    *program = (tw_program){length, code};
    if (length > 0 && !tw_program_valid(program, symbols)) {
        PyErr_SetString(PyExc_ValueError, "an expression is malformed or too deep");
        return -1;
    }
    return 0;
}

static int parse_program(tw_description *description, PyObject *tuple, tw_program *program) {
    return parse_program_over(description, tuple, description->symbol_count, program);
}

static int parse_tensor(tw_description *description, PyObject *tuple, tw_tensor_rule *rule) {
    int code, bits, optional, values, lengths;
    long long page_size;
    PyObject *dims, *bound;
    if (!PyArg_ParseTuple(tuple, "iipiOOiL", &code, &bits, &optional, &values, &dims, &bound, &lengths, &page_size)) {
        return -1;
    }
    if (values == TW_PAGES && (lengths < 0 || lengths >= description->tensor_count || page_size < 1)) {
        PyErr_SetString(PyExc_ValueError, "a table of pages needs lengths and the size of a page");
        return -1;
    }
    rule->lengths = lengths;
    rule->page_size = page_size;
    rule->code = (uint8_t)code;
    rule->bits = (uint8_t)bits;
    rule->optional = optional;
    rule->values = (tw_value_check)values;
    if ((rule->ndim = length_of(dims, TW_MAX_DIMS)) < 0) {
        return -1;
    }
    for (int d = 0; d < rule->ndim; d++) {
        rule->dims[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(dims, d));
    }
    return PyErr_Occurred() ? -1 : parse_program(description, bound, &rule->bound);
}

static int parse_map(tw_description *description, PyObject *tuple, tw_map **made) {
    unsigned long long element_bytes;
    PyObject *shape, *box;
    if (tuple == Py_None) {
        return 0;
    }
    tw_map *map = *made = allocate(description, 1, sizeof(tw_map));
    if (map == NULL || !PyArg_ParseTuple(tuple, "OOKiii", &shape, &box, &element_bytes, &map->data_type, &map->swizzle,
                                         &map->l2_promotion)) {
        return -1;
    }
    map->element_bytes = element_bytes;
    if ((map->rank = length_of(shape, TW_MAX_MAP_RANK)) < 0 || length_of(box, TW_MAX_MAP_RANK) != map->rank) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "a tensor map has another box than shape");
        }
        return -1;
    }
    for (int i = 0; i < map->rank; i++) {
        if (parse_program(description, PyTuple_GET_ITEM(shape, i), &map->shape[i]) != 0) {
            return -1;
        }
        map->box[i] = (uint32_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(box, i));
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int parse_attributes(PyObject *tuple, tw_grid *grid) {
    if ((grid->attribute_count = length_of(tuple, TW_MAX_ATTRIBUTES)) < 0) {
        return -1;
    }
    for (int i = 0; i < grid->attribute_count; i++) {
        tw_launch_attribute *attribute = &grid->attributes[i];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(tuple, i), "IIII", &attribute->id, &attribute->value[0],
                              &attribute->value[1], &attribute->value[2])) {
            return -1;
        }
    }
    return 0;
}

static int parse_grid(tw_description *description, PyObject *tuple, tw_grid **made) {
    PyObject *programs, *attributes, *parameters;
    if (tuple == Py_None) {
        return 0;
    }
    tw_grid *grid = *made = allocate(description, 1, sizeof(tw_grid));
    if (grid == NULL || !PyArg_ParseTuple(tuple, "OIiOO", &programs, &grid->shared_bytes, &grid->hidden, &attributes,
                                          &parameters)) {
        return -1;
    }
    if (length_of(programs, 6) != 6) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "a grid and its blocks have three dimensions each");
        }
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        if (parse_program(description, PyTuple_GET_ITEM(programs, i), &grid->blocks[i]) != 0 ||
            parse_program(description, PyTuple_GET_ITEM(programs, 3 + i), &grid->threads[i]) != 0) {
            return -1;
        }
    }
    if ((grid->parameter_count = length_of(parameters, TW_MAX_PARAMETERS)) < 0) {
        return -1;
    }
    for (int i = 0; i < grid->parameter_count; i++) {
        grid->parameter_bytes[i] = (uint8_t)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(parameters, i));
    }
    return PyErr_Occurred() ? -1 : parse_attributes(attributes, grid);
}

static int parse_launch(tw_description *description, PyObject *tuple, tw_launch *launch) {
    unsigned long long entry;
    PyObject *arguments, *grid;
    if (!PyArg_ParseTuple(tuple, "KOO", &entry, &arguments, &grid) ||
        parse_grid(description, grid, &launch->grid) != 0) {
        return -1;
    }
    launch->entry = (uintptr_t)entry;
    if ((launch->argument_count = length_of(arguments, TW_MAX_ARGUMENTS)) < 0) {
        return -1;
    }
    for (int i = 0; i < launch->argument_count; i++) {
        tw_argument *argument = &launch->arguments[i];
        int kind;
        long long value;
        PyObject *program, *map;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(arguments, i), "iLOO", &kind, &value, &program, &map) ||
            parse_program(description, program, &argument->program) != 0 ||
            parse_map(description, map, &argument->map) != 0) {
            return -1;
        }
        argument->kind = (tw_argument_kind)kind;
        argument->value = value;
    }
    return 0;
}

static int parse_guard(tw_description *description, PyObject *tuple, tw_guard *guard) {
    PyObject *expression;
    long long multiple;
    if (!PyArg_ParseTuple(tuple, "OL", &expression, &multiple)) {
        return -1;
    }
    if (multiple < 1) {
        PyErr_SetString(PyExc_ValueError, "a guard wants multiples of less than 1");
        return -1;
    }
    guard->multiple = multiple;
    int symbols = description->symbol_count + description->tensor_count + 1;
    return parse_program_over(description, expression, symbols, &guard->expression);
}

static int parse_guards(tw_description *description, PyObject *tuple, int *count, tw_guard **guards) {
    if ((*count = length_of(tuple, 256)) < 0 ||
        (*guards = allocate(description, (size_t)*count, sizeof(tw_guard))) == NULL) {
        return -1;
    }
    for (int i = 0; i < *count; i++) {
        if (parse_guard(description, PyTuple_GET_ITEM(tuple, i), &(*guards)[i]) != 0) {
            return -1;
        }
    }
    return 0;
}

static int parse_variant(tw_description *description, PyObject *tuple, tw_variant *variant) {
    long long max_size;
    int zeroed;
    PyObject *workspace, *launches, *guards, *workspace_guards;
    if (!PyArg_ParseTuple(tuple, "LOpOOO", &max_size, &workspace, &zeroed, &launches, &guards, &workspace_guards) ||
        parse_program(description, workspace, &variant->workspace_bytes) != 0 ||
        (variant->launch_count = length_of(launches, 64)) < 0 ||
        parse_guards(description, guards, &variant->guard_count, &variant->guards) != 0 ||
        parse_guards(description, workspace_guards, &variant->workspace_guard_count, &variant->workspace_guards) != 0) {
        return -1;
    }
    variant->max_size = max_size;
    variant->workspace_zeroed = zeroed;
    variant->guards_read_addresses = variant->workspace_guard_count > 0;
    for (int i = 0; i < variant->guard_count; i++) {
        variant->guards_read_addresses |= tw_program_reads(&variant->guards[i].expression, description->symbol_count);
    }
    variant->launches = allocate(description, (size_t)variant->launch_count, sizeof(tw_launch));
    if (variant->launches == NULL) {
        return -1;
    }
    for (int i = 0; i < variant->launch_count; i++) {
        if (parse_launch(description, PyTuple_GET_ITEM(launches, i), &variant->launches[i]) != 0) {
            return -1;
        }
    }
    return 0;
}

static int parse_ranges(tw_description *description, PyObject *tuple) {
    if ((description->range_count = length_of(tuple, TW_MAX_TENSORS)) < 0) {
        return -1;
    }
    for (int i = 0; i < description->range_count; i++) {
        unsigned long long begin, end;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(tuple, i), "KK", &begin, &end)) {
            return -1;
        }
        description->ranges[i] = (tw_range){(uintptr_t)begin, (uintptr_t)end};
    }
    return 0;
}

/* Positions of the outputs; the tensors were counted before. */
static int parse_outputs(tw_description *description, PyObject *tuple) {
    if ((description->output_count = length_of(tuple, TW_MAX_TENSORS)) < 0) {
        return -1;
    }
    for (int i = 0; i < description->output_count; i++) {
        long position = PyLong_AsLong(PyTuple_GET_ITEM(tuple, i));
        if (position < 0 || position >= description->tensor_count) {
            if (!PyErr_Occurred()) {
                PyErr_SetString(PyExc_ValueError, "an output has no position among the tensors");
            }
            return -1;
        }
        description->outputs[i] = (int)position;
    }
    return 0;
}

int tw_description_parse(tw_description *description, PyObject *tuple) {
    PyObject *outputs, *tensors, *ranges, *variants;
    long long place_value;
    if (!PyArg_ParseTuple(tuple, "iiiOLiiLOOO", &description->symbol_count, &description->dynamic_symbol,
                          &description->place_symbol, &outputs, &place_value, &description->device_type,
                          &description->device_id, &description->most_workspace_bytes, &tensors, &ranges, &variants)) {
        return -1;
    }
    description->place_value = place_value;
    if (description->symbol_count > TW_MAX_SYMBOLS) {
        PyErr_Format(PyExc_ValueError, "a binding has %d sizes; at most %d are possible", description->symbol_count,
                     TW_MAX_SYMBOLS);
        return -1;
    }
    if ((description->tensor_count = length_of(tensors, TW_MAX_TENSORS)) < 0 ||
        (description->variant_count = length_of(variants, 4096)) < 0 || parse_ranges(description, ranges) != 0 ||
        parse_outputs(description, outputs) != 0) {
        return -1;
    }
    for (int i = 0; i < description->tensor_count; i++) {
        if (parse_tensor(description, PyTuple_GET_ITEM(tensors, i), &description->tensors[i]) != 0) {
            return -1;
        }
    }
    description->variants = allocate(description, (size_t)description->variant_count, sizeof(tw_variant));
    if (description->variants == NULL) {
        return -1;
    }
    for (int i = 0; i < description->variant_count; i++) {
        if (parse_variant(description, PyTuple_GET_ITEM(variants, i), &description->variants[i]) != 0) {
            return -1;
        }
    }
    return 0;
}
