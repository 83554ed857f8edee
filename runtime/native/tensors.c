#include "tensors.h"

static PyTypeObject *plain_tensor, *plain_parameter;
static PyObject *grad_enabled, *requires_grad, *is_neg;
static Py_ssize_t tensor_at, keys_at;
static uint64_t plain_keys; /* 0: where they lie is not known */
static int (*read_dltensor)(void *, DLTensor *);

int tw_tensors_setup(PyObject *tensor_type, PyObject *parameter_type, PyObject *capsule, PyObject *is_grad_enabled) {
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, TW_DLPACK_CAPSULE);
    if (api == NULL) {
        return -1;
    }
    while (api != NULL && api->version.major != TW_DLPACK_MAJOR) {
        api = api->prev_api;
    }
    if (api == NULL || api->dltensor_from_py_object_no_sync == NULL) {
        PyErr_SetString(PyExc_ImportError, "torch offers no DLPack exchange of version 1");
        return -1;
    }
    if (requires_grad == NULL && (requires_grad = PyUnicode_InternFromString("requires_grad")) == NULL) {
        return -1;
    }
    PyObject *method = PyObject_GetAttrString(tensor_type, "is_neg");
    if (method == NULL) {
        return -1;
    }
    Py_XSETREF(is_neg, method);
    read_dltensor = api->dltensor_from_py_object_no_sync;
    Py_XSETREF(plain_tensor, (PyTypeObject *)Py_NewRef(tensor_type));
    Py_XSETREF(plain_parameter, (PyTypeObject *)Py_NewRef(parameter_type));
    Py_XSETREF(grad_enabled, Py_NewRef(is_grad_enabled));
    return 0;
}

void tw_tensors_keys(Py_ssize_t tensor_in_object, Py_ssize_t keys_in_tensor, uint64_t keys) {
    tensor_at = tensor_in_object;
    keys_at = keys_in_tensor;
    plain_keys = keys;
}

/* Whether the memory holds the values. Of a view with the negative bit it holds their negatives, which DLPack does not
 * tell; asking torch takes 0.1 us, so that its keys are read where it is known where they lie. */
static bool holds_its_values(PyObject *tensor) {
    if (plain_keys != 0) {
        const char *held = *(const char *const *)((const char *)tensor + tensor_at);
        return (*(const uint64_t *)(held + keys_at) & ~plain_keys) == 0;
    }
    PyObject *answer = PyObject_CallOneArg(is_neg, tensor);
    Py_XDECREF(answer);
    return answer == Py_False;
}

bool tw_read_tensor(PyObject *object, DLTensor *tensor) {
    if (!Py_IS_TYPE(object, plain_tensor) && !Py_IS_TYPE(object, plain_parameter)) {
        return false;
    }
    if (!holds_its_values(object) || read_dltensor(object, tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    tensor->data = (char *)tensor->data + tensor->byte_offset;
    return true;
}

bool tw_needs_grad(PyObject *const *tensors, Py_ssize_t count) {
    PyObject *answer = PyObject_CallNoArgs(grad_enabled);
    bool needed = answer != Py_False;
    Py_XDECREF(answer);
    if (!needed) {
        return false;
    }
    needed = answer == NULL;
    for (Py_ssize_t i = 0; i < count && !needed; i++) {
        answer = PyObject_GetAttr(tensors[i], requires_grad);
        needed = answer != Py_False;
        Py_XDECREF(answer);
    }
    PyErr_Clear();
    return needed;
}

bool tw_is_dense(const DLTensor *tensor) {
    int64_t expected = 1;
    bool dense = true;
    for (int32_t d = tensor->ndim - 1; d >= 0; d--) {
        if (tensor->shape[d] == 0) {
            return true;
        }
        dense &= tensor->shape[d] == 1 || tensor->strides[d] == expected;
        expected *= tensor->shape[d];
    }
    return dense && (uintptr_t)tensor->data % (tensor->dtype.bits / 8) == 0;
}

int64_t tw_elements(const DLTensor *tensor) {
    int64_t elements = 1;
    for (int32_t d = 0; d < tensor->ndim; d++) {
        elements *= tensor->shape[d];
    }
    return elements;
}
