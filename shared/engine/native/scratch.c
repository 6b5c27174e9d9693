#include "scratch.h"

#include <stdio.h>
#include <stdlib.h>

static __thread void *memory;
static __thread size_t size;

void *scratch(size_t bytes) {
    if (bytes > size) {
        free(memory);
        size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
        memory = aligned_alloc(4096, size);
        if (memory == NULL) {
            fprintf(stderr, "banyan: no memory for %zu bytes of scratch\n", size);
            abort();
        }
    }
    return memory;
}
