"""What every run needs: flags, device, seeds, files, checkpoints. Knows no student or teacher."""
