// Calls one kernel in a program of its own, for CPUs that an emulator runs and for sanitizers:
//   driver INPUT OUTPUT
// INPUT holds 64-bit numbers: threads, the count of buffers, the size of each in bytes, the count of arguments, and
// per argument whether it is an address in a buffer (1) or plain (0), the buffer's number or its value, and the offset
// in the buffer; then the buffers' bytes.
// OUTPUT gets the buffers' bytes after the call. Compile with -DENTRY= the kernel's name.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*Body)(void *);
struct Host { int32_t abi_version, threads; void (*fork)(Body, void *, unsigned, unsigned); };
extern "C" int32_t tilewright_abi_version();
extern "C" int32_t ENTRY(const Host *host, const int64_t *arguments);

struct Started { Body body; void *data; };

static void *run(void *started) {
  ((Started *)started)->body(((Started *)started)->data);
  return nullptr;
}

static void fork_threads(Body body, void *data, unsigned threads, unsigned) {
  Started started = {body, data};
  pthread_t *others = new pthread_t[threads];
  for (unsigned t = 1; t < threads; t++) pthread_create(&others[t], nullptr, run, &started);
  body(data);
  for (unsigned t = 1; t < threads; t++) pthread_join(others[t], nullptr);
  delete[] others;
}

static FILE *input;

static int64_t number() {
  int64_t value;
  if (fread(&value, sizeof value, 1, input) != 1) exit(3);
  return value;
}

int main(int, char **paths) {
  input = fopen(paths[1], "rb");
  FILE *output = fopen(paths[2], "wb");
  if (!input || !output) return 3;
  const Host host = {tilewright_abi_version(), (int32_t)number(), fork_threads};
  const int64_t buffers = number();
  int64_t *sizes = new int64_t[buffers];
  for (int64_t b = 0; b < buffers; b++) sizes[b] = number();
  const int64_t count = number();
  int64_t *is_buffer = new int64_t[count], *arguments = new int64_t[count], *offsets = new int64_t[count];
  for (int64_t a = 0; a < count; a++) is_buffer[a] = number(), arguments[a] = number(), offsets[a] = number();
  void **memory = new void *[buffers];
  for (int64_t b = 0; b < buffers; b++) {
    if (posix_memalign(&memory[b], 64, sizes[b] ? sizes[b] : 1)) return 3;
    if (fread(memory[b], 1, sizes[b], input) != (size_t)sizes[b]) return 3;
  }
  for (int64_t a = 0; a < count; a++) {
    if (is_buffer[a]) arguments[a] = (int64_t)memory[arguments[a]] + offsets[a];
  }
  const int32_t status = ENTRY(&host, arguments);
  for (int64_t b = 0; b < buffers; b++) {
    fwrite(memory[b], 1, sizes[b], output);
    free(memory[b]);
  }
  delete[] sizes;
  delete[] is_buffer;
  delete[] arguments;
  delete[] offsets;
  delete[] memory;
  return fclose(output) || status ? 4 : 0;
}
