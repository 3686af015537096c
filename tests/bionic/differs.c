/* What Android's C library (bionic) does otherwise than glibc, or has alone, on 64-bit processors.
 *
 * bionic_NAME stands for NAME of bionic. Layouts and numbers are those of bionic's public headers (bits/pthread_types.h,
 * bits/sysconf.h, signal.h, stdio.h). What is the same in both is passed on; see bionic.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <wchar.h>

/* ---- errors */

int *bionic___errno(void) { return __errno_location(); }

int __xpg_strerror_r(int error, char *text, size_t room);

int bionic_strerror_r(int error, char *text, size_t room) { return __xpg_strerror_r(error, text, room); }

char *bionic___gnu_strerror_r(int error, char *text, size_t room) {
  __xpg_strerror_r(error, text, room);
  return text;
}

/* ---- files: stdin, stdout and stderr are three objects in a row for libraries of before Android 6, pointers for later ones */

enum { FILE_SIZE = 152 };
char bionic___sF[3 * FILE_SIZE];
FILE *bionic_stdin = (FILE *)bionic___sF;
FILE *bionic_stdout = (FILE *)(bionic___sF + FILE_SIZE);
FILE *bionic_stderr = (FILE *)(bionic___sF + 2 * FILE_SIZE);

static FILE *here(FILE *file) {
  char *place = (char *)file;
  if (place < bionic___sF || place >= bionic___sF + sizeof bionic___sF) return file;
  FILE *standard[] = {stdin, stdout, stderr};
  return standard[(place - bionic___sF) / FILE_SIZE];
}

int bionic_vfprintf(FILE *file, const char *format, va_list values) { return vfprintf(here(file), format, values); }

int bionic_fprintf(FILE *file, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int written = vfprintf(here(file), format, values);
  va_end(values);
  return written;
}

int bionic_fputs(const char *text, FILE *file) { return fputs(text, here(file)); }
int bionic_fputc(int c, FILE *file) { return fputc(c, here(file)); }
wint_t bionic_fputwc(wchar_t c, FILE *file) { return fputwc(c, here(file)); }
wint_t bionic_getwc(FILE *file) { return getwc(here(file)); }
wint_t bionic_ungetwc(wint_t c, FILE *file) { return ungetwc(c, here(file)); }
int bionic_getc(FILE *file) { return getc(here(file)); }
int bionic_ungetc(int c, FILE *file) { return ungetc(c, here(file)); }
int bionic_fflush(FILE *file) { return fflush(file ? here(file) : NULL); }
int bionic_fileno(FILE *file) { return fileno(here(file)); }
int bionic_fclose(FILE *file) { return fclose(here(file)); }
int bionic_fseek(FILE *file, long to, int from) { return fseek(here(file), to, from); }
int bionic_fseeko(FILE *file, off_t to, int from) { return fseeko(here(file), to, from); }
off_t bionic_ftello(FILE *file) { return ftello(here(file)); }

size_t bionic_fread(void *data, size_t size, size_t count, FILE *file) { return fread(data, size, count, here(file)); }

size_t bionic_fwrite(const void *data, size_t size, size_t count, FILE *file) {
  return fwrite(data, size, count, here(file));
}

/* ---- what the system has: other numbers for the same questions */

long bionic_sysconf(int what) {
  switch (what) {
    case 0x00: return sysconf(_SC_ARG_MAX);
    case 0x06: return sysconf(_SC_CLK_TCK);
    case 0x0b: return sysconf(_SC_OPEN_MAX);
    case 0x27: /* _SC_PAGESIZE and _SC_PAGE_SIZE */
    case 0x28: return sysconf(_SC_PAGESIZE);
    case 0x60: return sysconf(_SC_NPROCESSORS_CONF);
    case 0x61: return sysconf(_SC_NPROCESSORS_ONLN);
    case 0x62: return sysconf(_SC_PHYS_PAGES);
    case 0x63: return sysconf(_SC_AVPHYS_PAGES);
  }
  fprintf(stderr, "sysconf(%#x): not among those that differs.c knows\n", what);
  abort();
}

int bionic___system_property_get(const char *name, char *value) {
  (void)name;
  *value = 0; /* as of a property that is not set */
  return 0;
}

/* ---- threads: attributes of other layout, and condition variables that lie where glibc's may not */

struct attributes {
  unsigned flags;
  void *stack;
  size_t stack_size, guard_size;
  int policy, priority;
  char reserved[16];
};
enum { STACK_SIZE = 1 << 20 };

int bionic_pthread_attr_init(struct attributes *attributes) {
  memset(attributes, 0, sizeof *attributes);
  attributes->stack_size = STACK_SIZE;
  return 0;
}

int bionic_pthread_attr_setstacksize(struct attributes *attributes, size_t size) {
  attributes->stack_size = size;
  return 0;
}

int bionic_pthread_create(pthread_t *thread, const struct attributes *given, void *(*work)(void *), void *argument) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  if (given && given->stack_size > STACK_SIZE) pthread_attr_setstacksize(&attributes, given->stack_size);
  int error = pthread_create(thread, &attributes, work, argument);
  pthread_attr_destroy(&attributes);
  return error;
}

/* glibc's may be larger. What it uses lies within bionic's 40 bytes; those behind belong to somebody else. */
enum { MUTEX_SIZE = 40 };

int bionic_pthread_mutex_init(void *mutex, const pthread_mutexattr_t *attributes) {
  pthread_mutex_t made;
  int error = pthread_mutex_init(&made, attributes);
  memcpy(mutex, &made, MUTEX_SIZE);
  return error;
}

/* A counter in the first four bytes, as bionic has it: whoever waits, waits for it to change. */
static int woken(unsigned *condition, int waiting) {
  __atomic_fetch_add(condition, 2, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, condition, FUTEX_WAKE_PRIVATE, waiting, NULL, NULL, 0);
  return 0;
}

int bionic_pthread_cond_signal(unsigned *condition) { return woken(condition, 1); }
int bionic_pthread_cond_broadcast(unsigned *condition) { return woken(condition, 1 << 30); }

int bionic_pthread_cond_destroy(unsigned *condition) {
  (void)condition;
  return 0;
}

int bionic_pthread_cond_timedwait(unsigned *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  unsigned before = __atomic_load_n(condition, __ATOMIC_SEQ_CST);
  pthread_mutex_unlock(mutex);
  int how = FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME;
  long failed = syscall(SYS_futex, condition, how, before, until, NULL, ~0u);
  int late = failed && errno == ETIMEDOUT;
  pthread_mutex_lock(mutex);
  return late ? ETIMEDOUT : 0;
}

int bionic_pthread_cond_wait(unsigned *condition, pthread_mutex_t *mutex) {
  return bionic_pthread_cond_timedwait(condition, mutex, NULL);
}

/* ---- signals: sets of one word */

int bionic_sigfillset(unsigned long *set) {
  *set = ~0ul;
  return 0;
}

int bionic_pthread_sigmask(int how, const unsigned long *set, unsigned long *old) {
  sigset_t given, before;
  sigemptyset(&given);
  if (set) memcpy(&given, set, sizeof *set);
  int error = pthread_sigmask(how, set ? &given : NULL, &before);
  if (old) memcpy(old, &before, sizeof *old);
  return error;
}

/* ---- calls that bionic checks */

size_t bionic___strlen_chk(const char *text, size_t room) {
  size_t length = strlen(text);
  if (length >= room) abort();
  return length;
}

char *bionic___strchr_chk(const char *text, int c, size_t room) {
  if (strlen(text) >= room) abort();
  return strchr(text, c);
}

void bionic___FD_SET_chk(int file, fd_set *set, size_t room) {
  (void)room;
  FD_SET(file, set);
}

int bionic___FD_ISSET_chk(int file, const fd_set *set, size_t room) {
  (void)room;
  return FD_ISSET(file, set);
}

/* ---- messages */

void android_set_abort_message(const char *text) { fprintf(stderr, "aborting: %s\n", text); }

int __android_log_write(int level, const char *from, const char *text) {
  (void)level;
  return fprintf(stderr, "[%s] %s\n", from, text);
}

int __android_log_vprint(int level, const char *from, const char *format, va_list values) {
  char text[1024];
  vsnprintf(text, sizeof text, format, values);
  return __android_log_write(level, from, text);
}

int __android_log_print(int level, const char *from, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int written = __android_log_vprint(level, from, format, values);
  va_end(values);
  return written;
}
