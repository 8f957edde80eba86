"""What run_all.sh and the command line call; nothing in lgap_utils imports it."""
