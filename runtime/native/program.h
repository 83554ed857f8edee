/* Integer expressions in reverse Polish form (codegen/recipe/expressions.py). */
#ifndef TILEWRIGHT_PROGRAM_H
#define TILEWRIGHT_PROGRAM_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int length; /* of `code`: two numbers per instruction */
    const int64_t *code;
} tw_program;

/* Whether the code is well formed: known instructions, symbols in range, one result, no deeper stack than there is. */
bool tw_program_valid(const tw_program *program, int symbols);

/* Whether the program reads a symbol at `first` or behind it. */
bool tw_program_reads(const tw_program *program, int first);

/* The program's value, with Python's rounding. False for a division by zero or a result beyond 64 bits. */
bool tw_evaluate(const tw_program *program, const int64_t *symbols, int64_t *result);

#endif
