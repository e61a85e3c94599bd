/* init - the first and only program of a Linux guest: says hello, with the kernel's command line and the number of CPUs
 * that work, and switches the machine off; with "end=port" in the command line it ends it with 42 through port 0xf4,
 * with "end=reboot" it reboots. Statically linked, /init of an initrd. */

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

int main(void)
{
    char line[4096] = "";
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    int file = open("/proc/cmdline", O_RDONLY);
    if (file >= 0 && read(file, line, sizeof line - 1) < 0)
        return 1;
    printf("hello from userspace on %ld CPUs: %s", sysconf(_SC_NPROCESSORS_ONLN), line);
    fflush(stdout);
    if (strstr(line, "end=port") && !ioperm(0xf4, 1, 1))
        outb(42, 0xf4);
    if (strstr(line, "end=reboot"))
        reboot(RB_AUTOBOOT);
    reboot(RB_POWER_OFF);
    return 1;
}
