/* Scratch memory of the calling thread, reused from call to call. */
#ifndef TILEWRIGHT_WORKSPACE_H
#define TILEWRIGHT_WORKSPACE_H

#include <stddef.h>

/* At least `bytes` bytes, aligned to 64, owned by the calling thread until it exits. NULL when out of memory. */
void *tw_workspace(size_t bytes);

#endif
