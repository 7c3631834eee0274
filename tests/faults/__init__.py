"""A campaign of faults against real runs of `easydel dpo`: kills, damaged files, full disks, two processes at once.

`runs` starts and judges runs, `campaign` holds the faults, `__main__` prints the table.
"""
