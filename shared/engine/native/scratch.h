/* Memory of a thread that lasts over calls: fresh pages for every product would cost more than the
 * product of a small batch. */
#ifndef BANYAN_SCRATCH_H
#define BANYAN_SCRATCH_H

#include <stddef.h>

/* At least `bytes`, 64-byte aligned, content undefined, valid until this thread's next call. */
void *scratch(size_t bytes);

#endif
