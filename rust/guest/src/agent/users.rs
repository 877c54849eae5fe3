//! Users: who "NAME|UID[:GROUP|GID]" is inside a root.
//!
//! Pure functions on the texts of the root's own /etc/passwd and /etc/group, which may be missing (empty) and are not trusted: lines that
//! make no sense are skipped. The rules are those of containers (src/isopod/engine/users.py): a name is looked up before a number is read
//! as one, the first line that matches counts, a number needs no account, without a group the account's own group and memberships apply.
//!
//! Source: passwd(5), group(5).

const ID_MAX: u32 = (1 << 31) - 1;
const TEXT_BYTES_MAX: usize = 256;
/// NGROUPS_MAX of Linux.
const GROUPS_MAX: usize = 65_536;

/// A process's identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// The primary group, then the groups the account is a member of, in the file's order.
    pub groups: Vec<u32>,
    /// The account's home, "/" without one.
    pub home: String,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// Return who `user` is, or what is wrong with it.
pub fn resolve(user: &str, passwd: &str, group: &str) -> Result<User, String> {
    if user.len() > TEXT_BYTES_MAX || user.contains(['\0', '\n']) {
        return Err("the user is malformed".to_owned());
    }
    let (who, which) = user.split_once(':').unwrap_or((user, ""));
    let account = find_account(if who.is_empty() { "0" } else { who }, passwd)?;
    let mut groups = vec![account.gid];
    if which.is_empty() {
        for (gid, members) in group.lines().filter_map(parse_group) {
            let is_member = !account.name.is_empty() && members.split(',').any(|member| member == account.name);
            if is_member && !groups.contains(&gid) {
                groups.push(gid);
            }
        }
    } else {
        groups = vec![find_group(which, group)?];
    }
    if groups.len() > GROUPS_MAX {
        return Err(format!("user {user:?} is in more than {GROUPS_MAX} groups"));
    }
    Ok(User { uid: account.uid, gid: groups[0], groups, home: account.home.to_owned() })
}

fn find_account<'a>(who: &str, passwd: &'a str) -> Result<Account<'a>, String> {
    if let Some(account) = passwd.lines().filter_map(parse_account).find(|account| account.name == who) {
        return Ok(account);
    }
    let uid = parse_id(who).ok_or_else(|| format!("the root has no user {who:?}"))?;
    let by_uid = passwd.lines().filter_map(parse_account).find(|account| u64::from(account.uid) == uid);
    match by_uid {
        Some(account) => Ok(account),
        None => Ok(Account { name: "", uid: in_range(uid)?, gid: 0, home: "/" }),
    }
}

fn find_group(which: &str, group: &str) -> Result<u32, String> {
    let named = group.lines().filter_map(|line| Some((line.split(':').next()?, parse_group(line)?.0)));
    if let Some((_, gid)) = named.into_iter().find(|(name, _)| *name == which) {
        return Ok(gid);
    }
    in_range(parse_id(which).ok_or_else(|| format!("the root has no group {which:?}"))?)
}

fn parse_account(line: &str) -> Option<Account<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    if fields.len() < 6 || fields[0].is_empty() {
        return None;
    }
    let (uid, gid) = (in_range(parse_id(fields[2])?).ok()?, in_range(parse_id(fields[3])?).ok()?);
    let home = if fields[5].starts_with('/') { fields[5] } else { "/" };
    Some(Account { name: fields[0], uid, gid, home })
}

fn parse_group(line: &str) -> Option<(u32, &str)> {
    let mut fields = line.split(':');
    let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
    let gid = in_range(parse_id(gid)?).ok()?;
    (!name.is_empty()).then(|| (gid, fields.next().unwrap_or("").trim()))
}

fn parse_id(text: &str) -> Option<u64> {
    let digits = text.trim();
    let is_number = !digits.is_empty() && digits.len() <= 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(u64::MAX))
}

fn in_range(number: u64) -> Result<u32, String> {
    u32::try_from(number).ok().filter(|id| *id <= ID_MAX).ok_or_else(|| format!("ids go from 0 to {ID_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::{User, resolve};

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:1:1::/:\nann:x:1000:100::/home/ann:\n1234:x:7:8::nowhere:\nann:x:5:5::/:\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,ann\nusers:x:100:ann\naudio:x:29:bob, ann\nvideo:x:44:ann,bob\nbad:x:y:ann\n77:x:78:\n";

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> User {
        User { uid, gid, groups: groups.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn a_name_a_number_and_nothing_are_looked_up_in_the_roots_own_files() {
        assert_eq!(resolve("", PASSWD, GROUP), Ok(user(0, 0, &[0, 10], "/root")));
        assert_eq!(resolve("ann", PASSWD, GROUP), Ok(user(1000, 100, &[100, 10, 44], "/home/ann")));
        assert_eq!(resolve("1000", PASSWD, GROUP), Ok(user(1000, 100, &[100, 10, 44], "/home/ann")));
        assert_eq!(resolve("ann:audio", PASSWD, GROUP), Ok(user(1000, 29, &[29], "/home/ann")));
        assert_eq!(resolve("ann:31", PASSWD, GROUP), Ok(user(1000, 31, &[31], "/home/ann")));
        assert_eq!(resolve(":77", PASSWD, GROUP), Ok(user(0, 78, &[78], "/root")), "a group called 77 wins over the number");
    }

    #[test]
    fn a_number_needs_no_account_and_an_account_named_like_one_wins() {
        assert_eq!(resolve("4711", PASSWD, GROUP), Ok(user(4711, 0, &[0], "/")));
        assert_eq!(resolve("4711:12", "", ""), Ok(user(4711, 12, &[12], "/")));
        assert_eq!(resolve("1234", PASSWD, GROUP), Ok(user(7, 8, &[8], "/")));
    }

    #[test]
    fn what_is_nobody_is_refused_with_its_name() {
        assert_eq!(resolve("eve", PASSWD, GROUP), Err("the root has no user \"eve\"".to_owned()));
        assert_eq!(resolve("ann:eves", PASSWD, GROUP), Err("the root has no group \"eves\"".to_owned()));
        assert_eq!(resolve("2147483648", PASSWD, GROUP), Err("ids go from 0 to 2147483647".to_owned()));
        assert_eq!(resolve("99999999999999999999", PASSWD, GROUP), Err("ids go from 0 to 2147483647".to_owned()));
        assert_eq!(resolve("-1", PASSWD, GROUP), Err("the root has no user \"-1\"".to_owned()));
        assert_eq!(resolve("a\nb", PASSWD, GROUP), Err("the user is malformed".to_owned()));
    }
}
