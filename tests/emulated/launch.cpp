// A kernel's source as a library for the CPU: `launch` takes its arguments as cuLaunchKernel does.
// KERNEL: its name, and that of its file.
#define TEXT(x) #x
#define FILE_OF(name) TEXT(name.cu)
#include FILE_OF(KERNEL)
#include <utility>

template <class... T, size_t... I>
void call(void (*kernel)(T...), void** given, std::index_sequence<I...>) {
    kernel(*(T*)given[I]...);
}
template <class... T>
void call(void (*kernel)(T...), void** given) {
    call(kernel, given, std::index_sequence_for<T...>());
}

static void** given;
extern "C" int bytes() { return BYTES; }
extern "C" int threads() { return THREADS; }
extern "C" void launch(int blocks, void** arguments) {
    given = arguments;
    run(blocks, THREADS, BYTES, [] { call(KERNEL, given); });
}
