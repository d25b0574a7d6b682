# A disk's first sector: switches for ever between text and graphics, and writes in either, so that a screen has something
# to show and QEMU to wait for.
#
#   as --32 -o modes.o modes.s && ld -m elf_i386 --oformat binary -Ttext 0x7c00 -o modes.bin modes.o
.code16
.globl _start
_start:
	cli
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %ss
	movw $0x7c00, %sp
	sti
again:
	movw $0x0003, %ax	# text, 80 by 25
	int $0x10
	call write
	movw $0x0012, %ax	# graphics, 640 by 480
	int $0x10
	call write
	jmp again

write:
	movw $600, %cx
1:	movb $0x0e, %ah
	movb %cl, %al
	andb $0x3f, %al
	addb $0x30, %al
	movw $7, %bx
	int $0x10
	loop 1b
	ret

.org 510
.word 0xaa55
