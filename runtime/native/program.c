#include "program.h"

#define STACK_DEPTH 16

/* Numbers as in codegen/recipe/expressions.py, Op. */
enum { CONSTANT, SYMBOL, ADD, SUBTRACT, MULTIPLY, FLOOR_DIVIDE, CEIL_DIVIDE, MINIMUM, MAXIMUM };

bool tw_program_valid(const tw_program *program, int symbols) {
    int depth = 0;
    if (program->length % 2 != 0) {
        return false;
    }
    for (int i = 0; i < program->length; i += 2) {
        int64_t op = program->code[i], operand = program->code[i + 1];
        if (op == CONSTANT || op == SYMBOL) {
            depth++;
            if (op == SYMBOL && (operand < 0 || operand >= symbols)) {
                return false;
            }
        } else if (op >= ADD && op <= MAXIMUM) {
            depth--;
        } else {
            return false;
        }
        if (depth < 1 || depth > STACK_DEPTH) {
            return false;
        }
    }
    return depth == 1;
}

bool tw_program_reads(const tw_program *program, int first) {
    for (int i = 0; i < program->length; i += 2) {
        if (program->code[i] == SYMBOL && program->code[i + 1] >= first) {
            return true;
        }
    }
    return false;
}

static bool divide(int64_t left, int64_t right, bool round_up, int64_t *result) {
    if (right == 0 || (left == INT64_MIN && right == -1)) {
        return false;
    }
    int64_t quotient = left / right;
    bool exact = left % right == 0, negative = (left < 0) != (right < 0);
    if (!exact && negative && !round_up) {
        quotient--;
    }
    if (!exact && !negative && round_up) {
        quotient++;
    }
    *result = quotient;
    return true;
}

static bool apply(int64_t op, int64_t left, int64_t right, int64_t *result) {
    switch (op) {
    case ADD:
        return !__builtin_add_overflow(left, right, result);
    case SUBTRACT:
        return !__builtin_sub_overflow(left, right, result);
    case MULTIPLY:
        return !__builtin_mul_overflow(left, right, result);
    case FLOOR_DIVIDE:
    case CEIL_DIVIDE:
        return divide(left, right, op == CEIL_DIVIDE, result);
    case MINIMUM:
        *result = left < right ? left : right;
        return true;
    default:
        *result = left > right ? left : right;
        return true;
    }
}

bool tw_evaluate(const tw_program *program, const int64_t *symbols, int64_t *result) {
    int64_t stack[STACK_DEPTH];
    int depth = 0;
    for (int i = 0; i < program->length; i += 2) {
        int64_t op = program->code[i], operand = program->code[i + 1];
        if (op == CONSTANT) {
            stack[depth++] = operand;
        } else if (op == SYMBOL) {
            stack[depth++] = symbols[operand];
        } else {
            depth--;
            if (!apply(op, stack[depth - 1], stack[depth], &stack[depth - 1])) {
                return false;
            }
        }
    }
    *result = stack[0];
    return true;
}
