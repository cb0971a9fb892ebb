"""What every layer uses: files, run folders, devices, messages, errors and process-wide switches."""
