/* CPython extension `tilewright.runtime._native`: the fast half of runtime/calls/bind.py, packing.py and routing.py, which
 * describe what its functions take. Wherever it returns a refusal, the pure-Python twin says what is wrong. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdbool.h>

#include "native/bound_call.h"
#include "native/cuda_call.h"
#include "native/cuda_workspaces.h"
#include "native/host.h"
#include "native/norm.h"
#include "native/pack.h"
#include "native/routing.h"
#include "native/tensors.h"

static PyObject *set_pool(PyObject *Py_UNUSED(module), PyObject *args) {
    unsigned long long parallel, team_size;
    if (!PyArg_ParseTuple(args, "KK", &parallel, &team_size)) {
        return NULL;
    }
    int error = tw_set_pool((tw_fork_fn)(uintptr_t)parallel, (int (*)(void))(uintptr_t)team_size);
    if (error != 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *setup_torch(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *tensor_type, *parameter_type, *capsule, *is_grad_enabled;
    if (!PyArg_ParseTuple(args, "O!O!OO", &PyType_Type, &tensor_type, &PyType_Type, &parameter_type, &capsule,
                          &is_grad_enabled) ||
        tw_tensors_setup(tensor_type, parameter_type, capsule, is_grad_enabled) != 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *add_tensor_type(PyObject *Py_UNUSED(module), PyObject *args) {
    PyObject *type, *capsule;
    int is_torch;
    if (!PyArg_ParseTuple(args, "O!Op", &PyType_Type, &type, &capsule, &is_torch) ||
        tw_tensors_add(type, capsule, is_torch) != 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *set_tensor_keys(PyObject *Py_UNUSED(module), PyObject *args) {
    Py_ssize_t tensor_in_object, keys_in_tensor;
    unsigned long long keys;
    if (!PyArg_ParseTuple(args, "nnK", &tensor_in_object, &keys_in_tensor, &keys)) {
        return NULL;
    }
    tw_tensors_keys(tensor_in_object, keys_in_tensor, keys);
    Py_RETURN_NONE;
}

static PyObject *pack(PyObject *Py_UNUSED(module), PyObject *args) {
    tw_packing p;
    unsigned long long weight, packed;
    long long expert_stride, row_stride, experts, n, k, columns, halves, run, group, scales_per_row;
    int element, threads;
    bool packable;
    if (!PyArg_ParseTuple(args, "KLLLLLLLLiLLKi", &weight, &expert_stride, &row_stride, &experts, &n, &k, &columns,
                          &halves, &run, &element, &group, &scales_per_row, &packed, &threads)) {
        return NULL;
    }
    if (columns < 1 || columns > TW_MAX_COLUMNS || halves < 1 || run < 1 || columns % run != 0 || element < 0 ||
        element >= TW_ELEMENTS || group < 1 || k % group != 0 || scales_per_row < 0 || scales_per_row > 32) {
        PyErr_SetString(PyExc_ValueError, "impossible weight layout");
        return NULL;
    }
    p = (tw_packing){(const float *)(uintptr_t)weight,
                     expert_stride,
                     row_stride,
                     experts,
                     n,
                     k,
                     columns,
                     halves,
                     run,
                     (tw_element)element,
                     group,
                     scales_per_row,
                     (void *)(uintptr_t)packed};
    Py_BEGIN_ALLOW_THREADS
    packable = tw_pack(&p, threads);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(packable);
}

static bool is_dense_kind(PyObject *object, DLTensor *tensor, int code, int bits) {
    return tw_read_tensor(object, tensor) && tensor->device.device_type == kDLCPU && tensor->dtype.code == code &&
           tensor->dtype.bits == bits && tensor->dtype.lanes == 1 && tw_is_dense(tensor);
}

/* (topk_ids, experts, row_token, expert_offsets, slot_row) -> rows, or -1: refused. */
static PyObject *sort_tokens(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    DLTensor ids, row_token, offsets, slot_row;
    if (count != 5) {
        return PyErr_Format(PyExc_TypeError, "sort_tokens takes 5 arguments");
    }
    Py_ssize_t experts = PyLong_AsSsize_t(args[1]);
    if (experts == -1 && PyErr_Occurred()) {
        return NULL;
    }
    bool wide = !is_dense_kind(args[0], &ids, kDLInt, 32);
    if ((wide && !is_dense_kind(args[0], &ids, kDLInt, 64)) || !is_dense_kind(args[2], &row_token, kDLInt, 32) ||
        !is_dense_kind(args[3], &offsets, kDLInt, 32) || !is_dense_kind(args[4], &slot_row, kDLInt, 32) ||
        ids.ndim != 2 || slot_row.ndim != 2 || row_token.ndim != 1 || offsets.ndim != 1) {
        return PyLong_FromLong(-1);
    }
    int64_t tokens = ids.shape[0], top_k = ids.shape[1];
    if (experts < 1 || tokens * top_k > INT32_MAX || slot_row.shape[0] != tokens || slot_row.shape[1] != top_k ||
        row_token.shape[0] < tokens * top_k || offsets.shape[0] != experts + 1) {
        return PyLong_FromLong(-1);
    }
    return PyLong_FromLongLong(
        tw_sort_tokens(ids.data, wide, tokens, top_k, experts, row_token.data, offsets.data, slot_row.data));
}

/* (logits, renormalize, topk_ids, topk_weights) -> whether it was done. */
static PyObject *softmax_topk(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    DLTensor logits, ids, weights;
    if (count != 4) {
        return PyErr_Format(PyExc_TypeError, "softmax_topk takes 4 arguments");
    }
    int renormalize = PyObject_IsTrue(args[1]);
    if (renormalize < 0) {
        return NULL;
    }
    if (!is_dense_kind(args[0], &logits, kDLFloat, 32) || !is_dense_kind(args[2], &ids, kDLInt, 32) ||
        !is_dense_kind(args[3], &weights, kDLFloat, 32) || logits.ndim != 2 || ids.ndim != 2 || weights.ndim != 2) {
        Py_RETURN_FALSE;
    }
    int64_t tokens = logits.shape[0], experts = logits.shape[1], top_k = ids.shape[1];
    if (ids.shape[0] != tokens || weights.shape[0] != tokens || weights.shape[1] != top_k || top_k < 1 ||
        top_k > experts) {
        Py_RETURN_FALSE;
    }
    int64_t refused;
    Py_BEGIN_ALLOW_THREADS
    refused = tw_softmax_topk(logits.data, experts, tokens, experts, top_k, renormalize, ids.data, weights.data);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(refused < 0);
}

/* (x, weight, epsilon, out) -> whether it was done. */
static PyObject *rms_norm(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
    DLTensor x, weight, out;
    if (count != 4) {
        return PyErr_Format(PyExc_TypeError, "rms_norm takes 4 arguments");
    }
    double epsilon = PyFloat_AsDouble(args[2]);
    if (epsilon == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    if (tw_needs_grad(args, 2) || !is_dense_kind(args[0], &x, kDLFloat, 32) ||
        !is_dense_kind(args[1], &weight, kDLFloat, 32) || !is_dense_kind(args[3], &out, kDLFloat, 32) || x.ndim < 1 ||
        weight.ndim != 1 || weight.shape[0] < 1 || x.shape[x.ndim - 1] != weight.shape[0] ||
        tw_elements(&out) != tw_elements(&x)) {
        Py_RETURN_FALSE;
    }
    tw_rms_norm(x.data, weight.data, (float)epsilon, tw_elements(&x) / weight.shape[0], weight.shape[0], out.data);
    Py_RETURN_TRUE;
}

static PyMethodDef functions[] = {
    {"set_pool", set_pool, METH_VARARGS,
     "set_pool(GOMP_parallel, omp_get_num_threads), by addresses: install the thread pool of this process."},
    {"setup_torch", setup_torch, METH_VARARGS,
     "setup_torch(Tensor, Parameter, Tensor.__dlpack_c_exchange_api__, is_grad_enabled): before any call with tensors."},
    {"add_tensor_type", add_tensor_type, METH_VARARGS,
     "add_tensor_type(type, its __dlpack_c_exchange_api__, is_torch): read tensors of a further type, after setup_torch."},
    {"set_tensor_keys", set_tensor_keys, METH_VARARGS,
     "set_tensor_keys(tensor_in_object, keys_in_tensor, keys): where the dispatch keys of tensors lie, and those of plain "
     "ones; else each tensor is asked whether it is plain."},
    {"pack", pack, METH_VARARGS,
     "pack(weight, expert_stride, row_stride, experts, n, k, columns, halves, run, element, group, scales_per_row, packed, "
     "threads), by addresses -> False for weights that cannot be quantised."},
    {"sort_tokens", (PyCFunction)(void (*)(void))sort_tokens, METH_FASTCALL,
     "sort_tokens(topk_ids, experts, row_token, expert_offsets, slot_row) -> rows, or -1 for input it refuses."},
    {"softmax_topk", (PyCFunction)(void (*)(void))softmax_topk, METH_FASTCALL,
     "softmax_topk(logits, renormalize, topk_ids, topk_weights) -> False for input it refuses."},
    {"rms_norm", (PyCFunction)(void (*)(void))rms_norm, METH_FASTCALL,
     "rms_norm(x, weight, epsilon, out) -> False for input it refuses, and where gradients are recorded."},
    {NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Calls, packing, routing and norms in C.", -1, functions, NULL, NULL, NULL, NULL,
};

/* Adds a type that was just made, if it was. */
static int add_type(PyObject *module, const char *name, PyObject *type) {
    int failed = type == NULL || PyModule_AddObjectRef(module, name, type) != 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *self = PyModule_Create(&module);
    if (self == NULL) {
        return NULL;
    }
    if (add_type(self, "BoundCall", tw_bound_call_type()) != 0 || add_type(self, "CudaCall", tw_cuda_call_type()) != 0 ||
        add_type(self, "Workspaces", tw_cuda_workspaces_type()) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    return self;
}
