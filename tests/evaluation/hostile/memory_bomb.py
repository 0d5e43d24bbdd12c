# Takes memory until there is none, then asks for far more in the call; stops at 1 GiB by itself.
hoard = []
while len(hoard) < 16:
    try:
        hoard.append(bytearray(64 << 20))
    except MemoryError:
        break


def add(a, b):
    return a + b if len(hoard) == 16 else [0] * 10**12
