/* A function in C, of the standard library alone, but for the answer's status and type. To make module/main.wasm of it:
 *   python -m ziglang cc --target=wasm32-wasi -Oz -s -o module/main.wasm words.c       (pip install ziglang==0.17.1) */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EDGEWARD(name) __attribute__((import_module("edgeward"), import_name(name)))
EDGEWARD("header") int header(const char *name, int name_length, const char *value, int value_length);
EDGEWARD("status") int status(int status);

int main(int argc, char **argv) {
    size_t size = 0, room = 4096;
    char *text = malloc(room);
    for (size_t got; text && (got = fread(text + size, 1, room - size, stdin)) > 0;) {
        size += got;
        if (size == room) text = realloc(text, room *= 2);
    }
    if (!text) {
        fprintf(stderr, "<3>no memory for %zu bytes\n", room);
        return 2;
    }
    if (size == 0) {
        status(400);
        printf("nothing to count\n");
        return 0;
    }
    int words = 0;
    for (size_t i = 0; i < size; i++)
        words += !isspace((unsigned char)text[i]) && (i == 0 || isspace((unsigned char)text[i - 1]));
    const char *type = "application/json", *greeting = getenv("GREETING");
    header("content-type", 12, type, (int)strlen(type));
    printf("{\"greeting\": \"%s\", \"words\": %d, \"bytes\": %zu}", greeting ? greeting : "", words, size);
    fprintf(stderr, "counted %d\n", words);
    if (fopen("/etc/passwd", "r")) fprintf(stderr, "<3>there are files\n"); /* there are none */
    return 0;
}
