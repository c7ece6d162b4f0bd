// Makes calls of the CPU library for a test that runs on another processor (python_tests/emulated.py). It reads requests from its
// input and writes answers to its output; all numbers are 64-bit integers of little endian.
//
//   request: function name and buffers, each as size and bytes; count of pointers, each as (buffer, offset in it, buffer that it
//            points to, offset in that); count of arguments, each as (buffer, offset in it), or (-1, value)
//   answer:  what the function returned, and the bytes of all buffers
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace {

void read_bytes(void *to, size_t size) {
  if (fread(to, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 1);
}

int64_t read_int() {
  int64_t value;
  read_bytes(&value, sizeof value);
  return value;
}

struct Buffer {
  char *data;
  int64_t size;
};

Buffer read_buffer() {
  const int64_t size = read_int();
  void *data = nullptr;
  if (posix_memalign(&data, 64, (size_t)size + 1)) exit(2);
  read_bytes(data, (size_t)size);
  return {(char *)data, size};
}

}  // namespace

int main(int, char **argv) {
  void *library = dlopen(argv[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 3;
  for (;;) {
    const Buffer name = read_buffer();
    name.data[name.size] = 0;
    std::vector<Buffer> buffers((size_t)read_int());
    for (Buffer &buffer : buffers) buffer = read_buffer();
    for (int64_t left = read_int(); left > 0; --left) {
      const int64_t where = read_int(), offset = read_int(), to = read_int();
      const char *address = buffers[(size_t)to].data + read_int();
      memcpy(buffers[(size_t)where].data + offset, &address, sizeof address);
    }
    int64_t arguments[3] = {};
    const int64_t count = read_int();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t buffer = read_int(), value = read_int();
      arguments[i] = buffer < 0 ? value : (int64_t)(buffers[(size_t)buffer].data + value);
    }
    void *function = dlsym(library, name.data);
    if (!function) return fprintf(stderr, "%s\n", dlerror()), 4;
    const int64_t status = ((int (*)(int64_t, int64_t, int64_t))function)(arguments[0], arguments[1], arguments[2]);
    fwrite(&status, sizeof status, 1, stdout);
    for (const Buffer &buffer : buffers) {
      fwrite(buffer.data, 1, (size_t)buffer.size, stdout);
      free(buffer.data);
    }
    free(name.data);
    fflush(stdout);
  }
}
