from benchmarks.accelerator.command import accelerator

if __name__ == "__main__":
    accelerator()
