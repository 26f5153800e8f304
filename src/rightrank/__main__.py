"""`python -m rightrank`."""

from rightrank.cli import main

if __name__ == "__main__":
    main()
