"""`python -m mepa_ds` is the `mepa` command."""

from mepa_ds.cli.main import main

if __name__ == "__main__":
    main()
