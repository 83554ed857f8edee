/* The Python type of a bound call. */
#ifndef TILEWRIGHT_BOUND_CALL_H
#define TILEWRIGHT_BOUND_CALL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Creates the type; a new reference, or NULL with an exception. */
PyObject *tw_bound_call_type(void);

#endif
