/* Scratch memory of kernels by device and stream, as runtime/calls/workspaces.py made it. The GIL guards it. */
#ifndef TILEWRIGHT_CUDA_WORKSPACES_H
#define TILEWRIGHT_CUDA_WORKSPACES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define TW_WORKSPACES "tilewright.runtime._native.Workspaces"

/* Creates the type; a new reference, or NULL with an exception. */
PyObject *tw_cuda_workspaces_type(void);

/* Address of at least `bytes` bytes in `workspaces`, an object of that type; 0: they have to be made. */
int64_t tw_cuda_workspace(PyObject *workspaces, int32_t device, const void *stream, int64_t bytes);

#endif
