# Fills the temporary folder; stops at 2000 files of 1 MiB by itself.
import time

for number in range(2000):
    with open(f"file{number}", "wb") as file:
        file.write(bytes(1 << 20))
time.sleep(20)
