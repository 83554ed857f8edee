/* Reading tensors of torch, and arrays of other libraries that offer the DLPack exchange, without Python attributes. */
#ifndef TILEWRIGHT_TENSORS_H
#define TILEWRIGHT_TENSORS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "dlpack.h"

/* A type of tensors, and what its library offers. */
typedef struct {
    PyTypeObject *type;
    int (*read)(void *py_object, DLTensor *out);
    int (*stream)(int32_t device_type, int32_t device_id, void **out); /* may be NULL */
    bool is_torch; /* may require gradients, and have the negative bit */
    bool has_keys; /* its objects are laid out as those of torch's own class are */
} tw_tensor_type;

/* Remember torch's types, exchange table and `is_grad_enabled`. 0, or -1 with an exception. */
int tw_tensors_setup(PyObject *tensor_type, PyObject *parameter_type, PyObject *capsule, PyObject *is_grad_enabled);

/* Remember a further type with its exchange table, in place of what was known of it. 0, or -1 with an exception. */
int tw_tensors_add(PyObject *type, PyObject *capsule, bool is_torch);

/* Remember that a tensor's object holds an address at one offset, and that there at another lie its dispatch keys, of
 * which a plain tensor has no others than `keys`. */
void tw_tensors_keys(Py_ssize_t tensor_in_object, Py_ssize_t keys_in_tensor, uint64_t keys);

/* Read a plain tensor (no subclass, no negative bit): its type, or NULL, with no exception set, for everything else. */
const tw_tensor_type *tw_read_tensor(PyObject *object, DLTensor *tensor);

/* Whether torch would record a graph for one of these plain tensors; also true when asking fails. */
bool tw_needs_grad(PyObject *const *tensors, Py_ssize_t count);

/* Whether elements lie in row-major order with no gaps, at an address that is a multiple of their size. */
bool tw_is_dense(const DLTensor *tensor);

int64_t tw_elements(const DLTensor *tensor);

#endif
