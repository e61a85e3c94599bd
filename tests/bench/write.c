/* The floor of a save: a bare write of so many bytes that aren't zero, and fsync.
 *
 *   write PATH BYTES    µs from open to close, one JSON object
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

int main(int argc, char **argv)
{
	const size_t piece = 1 << 20;
	size_t left = argc == 3 ? strtoull(argv[2], NULL, 0) : 0;
	uint64_t *data = malloc(piece), x = 88172645463325252ull;

	if (!left || !data)
		return 1;
	for (size_t i = 0; i < piece / 8; i++)
		data[i] = x ^= x << 13, x ^= x >> 7, x ^= x << 17;
	double start = now();
	int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0600);
	while (fd >= 0 && left) {
		ssize_t n = write(fd, data, left < piece ? left : piece);
		if (n <= 0)
			return 1;
		left -= n;
	}
	if (fd < 0 || fsync(fd) || close(fd))
		return 1;
	printf("{\"write\": %.1f}\n", now() - start);
	return 0;
}
