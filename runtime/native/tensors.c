#include "tensors.h"

enum { MOST_TYPES = 16, OWN_TYPES = 2 };

/* Torch's tensor, its parameter, then others. */
static tw_tensor_type types[MOST_TYPES];
static int type_count;
static PyObject *grad_enabled, *requires_grad, *is_neg;
static Py_ssize_t tensor_at, keys_at;
static uint64_t plain_keys; /* 0: where they lie is not known */

/* The table of version 1; NULL with an exception where there is none. */
static const DLPackExchangeAPI *table_of(PyObject *capsule) {
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, TW_DLPACK_CAPSULE);
    if (api == NULL) {
        return NULL;
    }
    while (api != NULL && api->version.major != TW_DLPACK_MAJOR) {
        api = api->prev_api;
    }
    if (api == NULL || api->dltensor_from_py_object_no_sync == NULL) {
        PyErr_SetString(PyExc_ImportError, "the library offers no DLPack exchange of version 1");
        return NULL;
    }
    return api;
}

static void set_type(tw_tensor_type *entry, PyObject *type, const DLPackExchangeAPI *api, bool is_torch, bool has_keys) {
    PyTypeObject *before = entry->type;
    *entry = (tw_tensor_type){(PyTypeObject *)Py_NewRef(type), api->dltensor_from_py_object_no_sync,
                              api->current_work_stream, is_torch, has_keys};
    Py_XDECREF(before);
}

int tw_tensors_setup(PyObject *tensor_type, PyObject *parameter_type, PyObject *capsule, PyObject *is_grad_enabled) {
    const DLPackExchangeAPI *api = table_of(capsule);
    if (api == NULL) {
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
    set_type(&types[0], tensor_type, api, true, true);
    set_type(&types[1], parameter_type, api, true, true);
    type_count = type_count < OWN_TYPES ? OWN_TYPES : type_count;
    Py_XSETREF(grad_enabled, Py_NewRef(is_grad_enabled));
    return 0;
}

int tw_tensors_add(PyObject *type, PyObject *capsule, bool is_torch) {
    const DLPackExchangeAPI *api = table_of(capsule);
    if (api == NULL) {
        return -1;
    }
    int at = 0;
    while (at < type_count && (PyObject *)types[at].type != type) {
        at++;
    }
    if (type_count < OWN_TYPES || at == MOST_TYPES) {
        PyErr_SetString(PyExc_ImportError, "torch's tensors come first, and there are few others");
        return -1;
    }
    set_type(&types[at], type, api, is_torch, at < OWN_TYPES);
    type_count = at == type_count ? at + 1 : type_count;
    return 0;
}

void tw_tensors_keys(Py_ssize_t tensor_in_object, Py_ssize_t keys_in_tensor, uint64_t keys) {
    tensor_at = tensor_in_object;
    keys_at = keys_in_tensor;
    plain_keys = keys;
}

/* Whether the memory holds the values. Of a view with the negative bit it holds their negatives, which DLPack does not
 * tell; asking torch takes 0.1 us, so that its keys are read where it is known where they lie. */
static bool holds_its_values(const tw_tensor_type *type, PyObject *tensor) {
    if (!type->is_torch) {
        return true;
    }
    if (plain_keys != 0 && type->has_keys) {
        const char *held = *(const char *const *)((const char *)tensor + tensor_at);
        return (*(const uint64_t *)(held + keys_at) & ~plain_keys) == 0;
    }
    PyObject *answer = PyObject_CallOneArg(is_neg, tensor);
    Py_XDECREF(answer);
    return answer == Py_False;
}

const tw_tensor_type *tw_read_tensor(PyObject *object, DLTensor *tensor) {
    const tw_tensor_type *type = types, *end = types + type_count;
    while (type < end && !Py_IS_TYPE(object, type->type)) {
        type++;
    }
    if (type == end) {
        return NULL;
    }
    if (!holds_its_values(type, object) || type->read(object, tensor) != 0) {
        PyErr_Clear();
        return NULL;
    }
    tensor->data = (char *)tensor->data + tensor->byte_offset;
    return type;
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
