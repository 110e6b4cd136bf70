# The two pieces of machine code that ever run inside a target, x86-64.
# `python -m gpuksm.guard.arch.assemble` turns this file into x86_64.py; a test
# assembles it again and compares.
#
# 1. bootstrap: runs once, on a thread of the target that the guard has stopped.
#    It stands in unused bytes at the end of an executable page and never writes
#    to the thread's stack.  It restores every register by itself, so that the
#    guard may die at any instruction; while the guard lives it watches each
#    system call of it through PTRACE_SYSCALL.
# 2. agent: the helper thread.  It waits for work on its socket and performs the
#    system calls of a table, each only after it has claimed it and has seen that
#    the guard's end of the socket is open.

# ---------------------------------------------------------------- bootstrap
.set BLOCK_BYTES, 0x50000            # control block: header, table, stack
.set CODE_BYTES, 4096
.globl bootstrap, bootstrap_child, bootstrap_data, bootstrap_end, agent, agent_end
bootstrap:
    mov $14, %eax                    # rt_sigprocmask(SIG_SETMASK, all, NULL, 8): the agent inherits it
    mov $2, %edi
    lea all_signals(%rip), %rsi
    xor %edx, %edx
    mov $8, %r10d
    syscall
    mov $9, %eax                     # code page: mmap(place, 4096, R|X, PRIVATE|ANONYMOUS, -1, 0)
    mov place(%rip), %rdi            # far from all that the program has; elsewhere if that is taken
    mov $CODE_BYTES, %esi
    mov $5, %edx
    mov $0x22, %r10d
    mov $-1, %r8
    xor %r9d, %r9d
    syscall
    mov %rax, %r13
    cmp $-4096, %rax
    ja restore
    mov $9, %eax                     # control block: mmap(behind the code, BLOCK_BYTES, R|W, ...)
    lea CODE_BYTES(%r13), %rdi
    mov $BLOCK_BYTES, %esi
    mov $3, %edx
    syscall                          # r10, r8, r9 are kept by the kernel
    mov %rax, %r12
    cmp $-4096, %rax
    ja drop_code
    mov $28, %eax                    # a forked child inherits neither: madvise(MADV_DONTFORK)
    mov %r13, %rdi
    mov $CODE_BYTES, %esi
    mov $10, %edx
    syscall
    mov $28, %eax
    mov %r12, %rdi
    mov $BLOCK_BYTES, %esi
    mov $10, %edx
    syscall
    xor %ebx, %ebx
    mov $53, %eax                    # socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, block)
    mov $1, %edi
    mov $0x80001, %esi
    xor %edx, %edx
    mov %r12, %r10
    syscall
    test %eax, %eax
    jnz drop
    mov 8(%r12), %ebx                # set by the guard once the agent's code is in place
    test %ebx, %ebx
    jz 1f
    mov $56, %eax                    # clone(clone_flags, top of the block, &scratch, &scratch, the block)
    mov clone_flags(%rip), %rdi
    lea BLOCK_BYTES(%r12), %rsi
    lea 24(%r12), %rdx
    mov %rdx, %r10
    mov %r12, %r8
    syscall
    test %rax, %rax
    jz bootstrap_child
    js 1f
    cmp $2, %ebx                     # the agent shares our table still: nothing may be closed before it has its own
    jne 1f
apart:
    mov $202, %eax                   # futex(&apart, FUTEX_WAIT_PRIVATE, 0, NULL)
    lea 72(%r12), %rdi
    mov $128, %esi
    xor %edx, %edx
    xor %r10d, %r10d
    syscall
    cmpl $0, 72(%r12)
    je apart
    cmpl $2, 72(%r12)                # it cannot, and ends without touching the block any more
    jne 1f
    mov $3, %ebx
1:  mov $3, %eax                     # close both ends here; the agent has a table of its own
    mov 0(%r12), %edi
    syscall
    mov $3, %eax
    mov 4(%r12), %edi
    syscall                          # with it an agent whose guard is gone ends, and unmaps the block
    cmp $3, %ebx
    je drop
    test %ebx, %ebx                  # left alone before there was an agent: nothing may stay behind
    jnz restore
drop:
    mov $11, %eax                    # munmap(block)
    mov %r12, %rdi
    mov $BLOCK_BYTES, %esi
    syscall
    test %ebx, %ebx                  # the agent may be in its code page still
    jnz restore
drop_code:
    mov $11, %eax                    # munmap(code page)
    mov %r13, %rdi
    mov $CODE_BYTES, %esi
    syscall
restore:
    mov $14, %eax                    # rt_sigprocmask(SIG_SETMASK, the thread's own, NULL, 8)
    mov $2, %edi
    lea own_signals(%rip), %rsi
    xor %edx, %edx
    mov $8, %r10d
    syscall
    mov flags_of_ah(%rip), %rax      # al: overflow flag, ah: the low byte of rflags
    add $0x7f, %al
    sahf                             # from here on only mov and jmp, which keep the flags
    mov saved_rax(%rip), %rax
    mov saved_rbx(%rip), %rbx
    mov saved_rcx(%rip), %rcx
    mov saved_rdx(%rip), %rdx
    mov saved_rsi(%rip), %rsi
    mov saved_rdi(%rip), %rdi
    mov saved_rbp(%rip), %rbp
    mov saved_r8(%rip), %r8
    mov saved_r9(%rip), %r9
    mov saved_r10(%rip), %r10
    mov saved_r11(%rip), %r11
    mov saved_r12(%rip), %r12
    mov saved_r13(%rip), %r13
    mov saved_r14(%rip), %r14
    mov saved_r15(%rip), %r15
    jmp *saved_rip(%rip)
bootstrap_child:
    jmp *%r13
.balign 8
bootstrap_data:
all_signals: .quad -1
own_signals: .quad 0
flags_of_ah: .quad 0
saved_rax: .quad 0
saved_rbx: .quad 0
saved_rcx: .quad 0
saved_rdx: .quad 0
saved_rsi: .quad 0
saved_rdi: .quad 0
saved_rbp: .quad 0
saved_r8: .quad 0
saved_r9: .quad 0
saved_r10: .quad 0
saved_r11: .quad 0
saved_r12: .quad 0
saved_r13: .quad 0
saved_r14: .quad 0
saved_r15: .quad 0
saved_rip: .quad 0
place: .quad 0
clone_flags: .quad 0
bootstrap_end:

# ---------------------------------------------------------------- agent
# r12: control block.  Its header:
#    0 u32 our end of the socketpair    4 u32 the guard's end (closed here)
#    8 u32 go: 1, or 2 where it shares the table of descriptors at first
#   12 i32 claim eventfd, -1 during attach
#   16 u64 entries of this request     24 u64 scratch
#   32 u64 entries done since the start
#   40 i32 eventfd whose word lets the agent end, -1: it ends with the guard
#   72 u32 of go 2: 1 once it has a table of its own, 2 when it cannot have one
# entries from 4096 on, 64 bytes each:
#    0 u32 unused   4 u32 flags (1: linked, 2: only if the entry before gave 0,
#                     4: only while the guard is there, 8: of the range in the third
#                     argument only what lies below the first entry that flag 4 left out)
# r15: the first argument of that entry, 0 where there is none.
#    8 i64 number in, result out   16 6 x u64 arguments
.balign 64
agent:
    cmpl $2, 8(%r12)
    jne private
    mov $436, %eax                   # close_range(far beyond, far beyond, CLOSE_RANGE_UNSHARE) closes nothing
    mov $0x7ffffffe, %edi
    mov %edi, %esi
    mov $2, %edx
    syscall
    mov $1, %ebx
    test %rax, %rax
    jz 1f
    mov $2, %ebx
1:  mov $218, %eax                   # set_tid_address(NULL): nothing is written when we end
    xor %edi, %edi
    syscall
    mov %ebx, 72(%r12)
    mov $202, %eax                   # futex(&apart, FUTEX_WAKE_PRIVATE, 1)
    lea 72(%r12), %rdi
    mov $129, %esi
    mov $1, %edx
    syscall
    cmp $1, %ebx                     # the table is the process's: leave it alone
    jne gone
private:
    mov 0(%r12), %r14d
    test %r14d, %r14d
    jz 1f
    mov $436, %eax                   # close_range(0, socket - 1, 0), in the agent's own table
    xor %edi, %edi
    lea -1(%r14), %esi
    xor %edx, %edx
    syscall
1:  mov $436, %eax                   # close_range(socket + 1, ~0, 0)
    lea 1(%r14), %edi
    mov $-1, %esi
    xor %edx, %edx
    syscall
wait:
    xor %eax, %eax                   # read(socket, &entries, 8)
    mov %r14d, %edi
    lea 16(%r12), %rsi
    mov $8, %edx
    syscall
    cmp $8, %rax
    jne leave
    mov 16(%r12), %r13
    lea 4096(%r12), %rbx
    xor %r15d, %r15d
next:
    test %r13, %r13
    jz done
    testl $1, 4(%rbx)                # linked: belongs to the entry before, whatever became of the guard
    jnz linked
    xor %r15d, %r15d
    mov 12(%r12), %edi
    test %edi, %edi
    js alive
    xor %eax, %eax                   # claim: read(eventfd, &scratch, 8) takes one token, or the rest is cancelled
    lea 24(%r12), %rsi
    mov $8, %edx
    syscall
    cmp $8, %rax
    jne done
alive:
    mov $45, %eax                    # recvfrom(socket, &scratch, 1, MSG_PEEK|MSG_DONTWAIT, 0, 0): 0 = the guard is gone
    mov %r14d, %edi
    lea 24(%r12), %rsi
    mov $1, %edx
    mov $0x42, %r10d
    xor %r8d, %r8d
    xor %r9d, %r9d
    syscall
    test %rax, %rax
    jnz perform
    testl $1, 4(%rbx)
    jz leave
    mov 16(%rbx), %r15
cancelled:
    mov $-125, %rax                  # -ECANCELED
    jmp result
linked:
    testl $4, 4(%rbx)
    jz perform
    test %r15, %r15
    jz alive
    jmp cancelled
perform:
    testl $8, 4(%rbx)
    jz 1f
    test %r15, %r15
    jz 1f
    mov 32(%rbx), %rdx               # struct uffdio_range: start, length
    mov %r15, %rax
    sub 0(%rdx), %rax
    mov %rax, 8(%rdx)
1:  testl $2, 4(%rbx)
    jz call
    cmpq $0, -56(%rbx)
    jne cancelled
call:
    mov 8(%rbx), %rax
    mov 16(%rbx), %rdi
    mov 24(%rbx), %rsi
    mov 32(%rbx), %rdx
    mov 40(%rbx), %r10
    mov 48(%rbx), %r8
    mov 56(%rbx), %r9
    syscall
result:
    mov %rax, 8(%rbx)
    incq 32(%r12)
    add $64, %rbx
    dec %r13
    jmp next
done:
    mov $1, %eax                     # write(socket, &done, 8)
    mov %r14d, %edi
    lea 32(%r12), %rsi
    mov $8, %edx
    syscall
    jmp wait
leave:
    mov 40(%r12), %edi               # the guard is gone: merged memory may depend on our descriptors now, so
    test %edi, %edi                  # wait for the word of a guard: read(eventfd, &scratch, 8)
    js end
    xor %eax, %eax
    lea 24(%r12), %rsi
    mov $8, %edx
    syscall
    cmp $-4, %rax                    # -EINTR
    je leave
end:
    mov $11, %eax                    # munmap(block): from here on nothing but registers is used
    mov %r12, %rdi
    mov $BLOCK_BYTES, %esi
    syscall
gone:
    mov $60, %eax                    # exit(0), this thread only
    xor %edi, %edi
    syscall
agent_end:
