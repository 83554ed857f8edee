/* The Python type of a call that is bound to a CUDA device. */
#ifndef TILEWRIGHT_CUDA_CALL_H
#define TILEWRIGHT_CUDA_CALL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Creates the type; a new reference, or NULL with an exception. */
PyObject *tw_cuda_call_type(void);

#endif
