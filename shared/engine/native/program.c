/* Runs what was recorded: the calls of many layers without a return to Python between them. */
#include "kernels.h"

void run_calls(const call_t *calls, int64_t count, int64_t num_rows) {
    for (const call_t *call = calls; call < calls + count; call++) {
        const argument_t *a = call->arguments;
        switch (call->operation) {
        case RUN_LINEAR:
            run_linear(a[0].pointer, a[1].integer, a[2].pointer, a[3].integer, a[4].pointer,
                       a[5].integer, num_rows, a[7].integer);
            break;
        case RMS_NORM:
            rms_norm(a[0].pointer, a[1].pointer, a[2].pointer, a[3].pointer, num_rows,
                     a[5].integer, a[6].integer, a[7].number, a[8].integer, a[9].integer);
            break;
        case ROPE:
            rope(a[0].pointer, a[1].integer, a[2].pointer, num_rows, a[4].integer, a[5].integer,
                 a[6].integer, a[7].pointer, a[8].number, a[9].integer, a[10].integer);
            break;
        case ATTENTION:
            attention(a[0].pointer, a[1].pointer, a[2].pointer, num_rows, a[4].pointer,
                      a[5].pointer, a[6].integer, a[7].pointer, a[8].pointer, a[9].integer,
                      a[10].pointer, a[11].integer, a[12].integer);
            break;
        }
    }
}
